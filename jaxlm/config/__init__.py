"""Every option of jaxlm, as one tree of frozen dataclasses. Neutral: no JAX, no torch.

`model` and `model_parts` describe a model, `run` its training; `toml` reads and writes them, `registry` knows names.
"""

from jaxlm.config.data import Curriculum, Data, Fim, MixtureSource, Repository
from jaxlm.config.model import Model
from jaxlm.config.model_parts import Mamba, MoE, RopeScaling
from jaxlm.config.preference import Preference, Reward
from jaxlm.config.reinforcement import RL
from jaxlm.config.run import (
    AXES,
    Backend,
    Checkpoint,
    Config,
    Dcn,
    Distributed,
    Eval,
    Log,
    Mesh,
    Numerics,
    Sample,
    Tokenizer,
    Train,
)
from jaxlm.config.stages import SFT, Distill, LoRA

__all__ = [
    "AXES",
    "RL",
    "SFT",
    "Backend",
    "Checkpoint",
    "Config",
    "Curriculum",
    "Data",
    "Dcn",
    "Distill",
    "Distributed",
    "Eval",
    "Fim",
    "LoRA",
    "Log",
    "Mamba",
    "Mesh",
    "MixtureSource",
    "MoE",
    "Model",
    "Numerics",
    "Preference",
    "Repository",
    "Reward",
    "RopeScaling",
    "Sample",
    "Tokenizer",
    "Train",
]
