"""Defaults of `[sampling]` from the model, as its maker recommends them."""

from collections.abc import Collection

import msgspec

from moempi.config.job import Job
from moempi.config.recommended import with_recommended
from moempi.errors import ConfigError, DataError
from moempi.storage.weights import WeightFile


def with_sampling_defaults(job: Job, *, given: Collection[str]) -> Job:
    """The job with the model's values of the keys of `[sampling]` that are not `given`, if it asks for these.

    Raises NoInputError or DataError for the weight file, ConfigError if it recommends none.
    """
    if job.sampling.defaults != "model":
        return job
    with WeightFile.open(job.model.weights, whole=False) as weights:
        recommended = weights.sampling
    if not recommended:
        raise ConfigError(
            f"sampling.defaults: {job.model.weights} has none: its checkpoint had no generation_config.json with some, "
            "or it must be converted again"
        )
    try:
        return msgspec.structs.replace(job, sampling=with_recommended(job.sampling, recommended, given=given))
    except ValueError as error:
        raise DataError(f"{job.model.weights}: its sampling defaults: {error}") from error
