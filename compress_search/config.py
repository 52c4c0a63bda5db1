"""StudyConfig: one YAML file says what a study is; it is read, checked as a whole, and saved resolved.

Example::

    # compress-search run configs/digits.yaml
    name: digits
    task: ../studies/digits.py:task
    target: 0.5
    n_trials: 12
    fine_tune: {epochs: 4, lr: 0.02}
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from compress_search.config_reading import build, did_you_mean, read_override, read_yaml, unknown_keys
from compress_search.exceptions import ConfigError
from compress_search.recipe import FineTune
from compress_search.search.settings import SearchSettings
from compress_search.task import Task
from compress_search.task_loading import load_task, resolve_task
from compress_search.workspace import write_text_atomically
