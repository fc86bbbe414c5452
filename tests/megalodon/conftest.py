"""What tests of the model at home in transformers share."""

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

# What the pipeline of earlier versions (5.17 is one) warns of in its own call of generate.
OF_THEIR_PIPELINE = (
    "Passing `generation_config` together with generation-related arguments",
    "Both `max_new_tokens` (",
)


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if not message.startswith(OF_THEIR_PIPELINE):
            self.messages.append(message)


@pytest.fixture
def no_warnings():
    """Python's warnings raise, and what transformers logs from WARNING on fails the test."""
    collector = _Collector()
    logger = logging.getLogger("transformers")
    logger.addHandler(collector)
    # transformers says some things once a process; here each test is to hear them.
    transformers_logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(collector)
    assert not collector.messages
