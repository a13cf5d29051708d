"""DeepSeek-V3.2 and -V3.2-Exp: DeepSeek-V3 with an indexer in every layer."""

from moempi.config.architecture import Architecture
from moempi.config.families._deepseek import corrected_router, deepseek
from moempi.config.families._family import Family
from moempi.config.families._indexer import INDEXED_NAMES, read_indexer
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    indexer = read_indexer(config, interleaved=False)
    return deepseek(config, "deepseek_v32", router=corrected_router(config), indexer=indexer)


DEEPSEEK_V32 = Family(model_type="deepseek_v32", architecture=_architecture, names=INDEXED_NAMES, more_layers=True)
