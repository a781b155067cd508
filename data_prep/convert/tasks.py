"""The Ray task: one work unit. Lost tasks are submitted again by the driver, which counts and names them."""

from __future__ import annotations

import ray

from data_prep.convert.unit import encode_unit

encode_unit_task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(encode_unit)
