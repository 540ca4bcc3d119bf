"""Every error that Orthrus raises on purpose.

    OrthrusError
     ├── UserInputError         a wrong argument, prompt or option
     ├── ModelNotFoundError     no model behind that name, path or hub id
     ├── UnsupportedModelError  the model exists, but its layers cannot be twinned
     ├── CorruptFileError       a file is truncated, altered or not what its name says
     ├── CheckpointError        a view does not fit its base, or its folder is incomplete
     ├── StorageError           the disk is full, or a folder cannot be written
     ├── DivergedError          training: the loss became NaN or infinite
     └── MissingExtraError      an optional dependency is not installed

    OrthrusWarning            works, but not as well as one may think

A message is one sentence that gives the cause and the next step. The command line prints it after `error:` and exits
with status 2. A traceback means an error that this project did not foresee.
"""


class OrthrusError(Exception):
    """The base class of all errors that Orthrus raises on purpose."""


class UserInputError(OrthrusError):
    """An argument, prompt or option is wrong; the message names it and what is allowed."""


class ModelNotFoundError(OrthrusError):
    """No model was found behind the given name, or it cannot be reached from here."""


class UnsupportedModelError(OrthrusError):
    """The model cannot carry a second view; the message names the layer or the family."""


class CorruptFileError(OrthrusError):
    """A file is unreadable, truncated, or has another checksum than it should."""


class CheckpointError(OrthrusError):
    """A trained view is incomplete, or belongs to another base model."""


class StorageError(OrthrusError):
    """The disk is full, or a folder is not writable; the message names the path and the need."""


class DivergedError(OrthrusError):
    """The loss or the gradient became NaN or infinite; the last saved state is untouched."""


class MissingExtraError(OrthrusError):
    """An optional dependency is missing; the message names the `pip install` line."""


class OrthrusWarning(UserWarning):
    """Something works, but not as well as the user may think; the command line prints it as one line."""
