"""What stands between a connection and the app: who may come in, how much and how fast, and what is written down."""
