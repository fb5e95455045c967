"""Model families: one file each, named by `model_type`, on the shared decoder skeleton."""
