"""What can be wrong with a checkpoint. Every error here is the caller's to fix and prints as one line.

WeightsError
├── ConfigError        config.json is missing, malformed, or asks for something this project cannot serve
├── CheckpointError    a file of the checkpoint is missing, unsafe or corrupt; a tensor is missing, doubled, left over,
│                      of the wrong shape or of the wrong dtype
└── HubError           a repository id could not be resolved
"""


class WeightsError(Exception):
    """Base of all errors raised by `weights`."""


class ConfigError(WeightsError):
    """The model's configuration cannot be used; the message names the field."""


class CheckpointError(WeightsError):
    """A checkpoint's files cannot be used; the message names the file or the tensor."""


class HubError(WeightsError):
    """A repository id could not be turned into a local folder."""
