"""Logging: one line per record on stderr, or JSON.

Environment variables: ``UDRL_LOG_LEVEL`` (default INFO) and ``UDRL_LOG_FORMAT`` (``text`` or ``json``).
"""

import json
import logging
import os
import sys
import time
from typing import TextIO

from udrl.errors import UserError

LEVEL_VARIABLE, FORMAT_VARIABLE = "UDRL_LOG_LEVEL", "UDRL_LOG_FORMAT"
FORMATS = ("text", "json")
# The packages whose records are shown; libraries keep their own handlers.
PACKAGES = ("udrl", "serve", "jobs")


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (ISO 8601, UTC), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": created, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The bare message at level INFO; other levels are named before it."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = level + record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class StderrHandler(logging.StreamHandler[TextIO]):
    """Write to the current ``sys.stderr``, which tests and progress bars replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is looked up for each record."""


def configure() -> None:
    """Send the records of this project's packages to stderr; idempotent.

    Raises:
        UserError: an environment variable has a value that is not allowed.
    """
    level, form = os.environ.get(LEVEL_VARIABLE, "INFO").upper(), os.environ.get(FORMAT_VARIABLE, "text").lower()
    if level not in logging.getLevelNamesMapping():
        raise UserError(f"{LEVEL_VARIABLE}: not a level ({level}); use DEBUG, INFO, WARNING or ERROR")
    if form not in FORMATS:
        raise UserError(f"{FORMAT_VARIABLE}: not a format ({form}); use {' or '.join(FORMATS)}")
    for name in PACKAGES:
        logger = logging.getLogger(name)
        handler = next((one for one in logger.handlers if isinstance(one, StderrHandler)), None) or StderrHandler()
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
        logger.addHandler(handler)  # does nothing if it is there
        logger.setLevel(level)
        logger.propagate = False
