"""What can go wrong, and how the command line ends when it does.

    OffloadError               1  internal failure
      UsageError               2  a flag, a value, a combination of flags
      ModelError               3  the model, tokenizer, tree or profile file is invalid
        CheckpointError        3  safetensors files or their index
      FitError                 4  something does not fit: memory budget, context
        OutOfMemoryError       4  the machine has less memory than was planned with
          HostMemoryError      4
          DeviceMemoryError    4
      IntegrityError           5  contents differ from their manifest
      NumericError             6  NaN or Inf logits
      DeviceError              7  the device or the disk was lost

Every error says three things, each on a line of its own: what is wrong (with the numbers or names), where (file or flag),
and what to do about it.
"""


class OffloadError(Exception):
    """Base of all errors that users see. `str(error)` is the three lines."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, cure: str) -> None:
        super().__init__(what, where, cure)
        self.what = _one_line(what)
        self.where = _one_line(where)
        self.cure = _one_line(cure)

    def __str__(self) -> str:
        return f"{self.what}\n  in: {self.where}\n  fix: {self.cure}"


class UsageError(OffloadError):
    exit_code = 2


class ModelError(OffloadError):
    exit_code = 3


class CheckpointError(ModelError):
    pass


class FitError(OffloadError):
    exit_code = 4


class OutOfMemoryError(FitError):
    pass


class HostMemoryError(OutOfMemoryError):
    pass


class DeviceMemoryError(OutOfMemoryError):
    pass


class IntegrityError(OffloadError):
    exit_code = 5


class NumericError(OffloadError):
    exit_code = 6


class DeviceError(OffloadError):
    exit_code = 7


def reason(error: Exception) -> str:
    """What an error of the system or a parser says, without the number and the file name: `where` has that."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _one_line(text: str) -> str:
    # Names come from files and from strangers: a line break in one would break the three lines, an escape the terminal.
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.split("\n"))
    )
