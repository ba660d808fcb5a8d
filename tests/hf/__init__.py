"""Tests of the integrations for transformers' Trainer and for TRL's."""

import pytest

pytest.register_assert_rewrite("tests.support.trl_steps")
