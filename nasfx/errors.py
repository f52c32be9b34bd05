"""Every error that nasfx raises on purpose.

A message says what happened, where (the pass, the node, the user's file and line) and what to do;
longer evidence, such as an excerpt of the graph, is attached as a note.
"""

import sys
from types import CodeType, FrameType, TracebackType


class NasfxError(Exception):
    """The base of all errors that nasfx raises."""


class TraceError(NasfxError):
    """The model cannot be turned into a graph."""


class SpaceError(NasfxError):
    """A choice, or an architecture of the search space, is wrong."""


class PassError(NasfxError):
    """A pass failed, or was given a graph that it does not take."""


class VerifyError(PassError):
    """A graph breaks a rule of its stage."""


class SearchError(NasfxError):
    """A search step or loop was used wrongly, or met values that it cannot go on with."""


class CheckpointError(NasfxError):
    """A checkpoint cannot be read, or belongs to something else."""


class ExportError(NasfxError):
    """A model cannot be exported, or the exported file does not compute what the model does."""


class ProfileError(NasfxError):
    """A latency cannot be predicted or measured."""


def _is_users(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    inside = module.split(".", 1)[0] in ("torch", "nasfx", "contextlib", "importlib")
    return not inside and not frame.f_code.co_filename.startswith(("<eval_with_key", "<frozen"))


def user_site(within: CodeType | None = None) -> str:
    """The `file:line` of the innermost running frame that is neither nasfx's nor torch's.

    Args:
        within: look only at what this code, of a running frame, has called; "" if nothing is there.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not within:
        if _is_users(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def error_site(error: BaseException) -> str:
    """The `file:line` of the innermost frame of the user's that `error` passed through."""
    site = ""
    tb: TracebackType | None = error.__traceback__
    while tb is not None:
        if _is_users(tb.tb_frame):
            site = f"{tb.tb_frame.f_code.co_filename}:{tb.tb_lineno}"
        tb = tb.tb_next
    return site
