"""The one error tree of qjax.

Every error a user can cause derives from `QjaxError`, so that `except QjaxError` is
enough at the edge of a program. Messages say what is wrong, where, what was found,
what was expected and what to do.
"""


class QjaxError(Exception):
    """Base of every error that qjax raises on purpose."""


class FormatError(QjaxError, ValueError):
    """A file or stored tensor does not follow its format."""


class SpecError(QjaxError, ValueError):
    """A request cannot be carried out as stated: a shape, option or recipe is wrong."""


class UnsupportedError(QjaxError, NotImplementedError):
    """The request is well-formed, but qjax does not support it."""


class IntegrityError(QjaxError):
    """Stored bytes differ from the digest recorded when they were written."""


class NonFiniteError(QjaxError, ValueError):
    """A tensor holds NaN or infinity where finite numbers are required."""


class MissingExtraError(QjaxError, ImportError):
    """An optional dependency is not installed; the message is the install command."""
