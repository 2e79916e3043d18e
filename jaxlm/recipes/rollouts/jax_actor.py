"""The policy in JAX as phases of reinforcement learning use it: it draws samples and says how likely they are.

Shapes: B samples, T tokens, G prompts, N samples of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.recipes.forward import forward


def _logps(decoder: Any, temperature: float, block: int, params: Any, batch: Any) -> Any:
    from jaxlm.objectives.logprobs import token_logps

    hidden_BTD, (kernel_DV, bias_V), _ = forward(decoder, params, batch, None)
    return token_logps(hidden_BTD, kernel_DV, bias_V, batch["targets"], temperature=temperature, block=block).logps


class JaxActor:
    """The policy in JAX as it stands.

    Args:
        params: as its objective takes them, so that log-probabilities are those of the trainer.
        whole: the same with adapters added to their base, for drawing; None: there are no adapters.
    """

    def __init__(
        self,
        decoder: Any,
        params: Any,
        reference: Any,
        cfg: config.Config,
        *,
        eos_id: int,
        pad: int,
        whole: Any = None,
    ) -> None:
        self.decoder, self.params, self.reference, self.config = decoder, params, reference, cfg
        self.whole = params if whole is None else whole
        self.ends: dict[str, int] = {"eos_id": eos_id, "pad_id": pad}

    def draw(
        self, prompts: Sequence[Sequence[int]], *, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """See `phases.Actor`."""
        from jaxlm.infer.generate import generate
        from jaxlm.text.sampling import Sampling

        sampling = Sampling(temperature=temperature)
        return generate(
            self.decoder, self.whole, prompts, sampling, max_new_tokens=max_new_tokens, seed=seed, **self.ends
        )

    def sample(
        self, prompts: Sequence[Sequence[int]], *, samples: int, temperature: float, max_new_tokens: int, seed: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """See `phases.Actor`."""
        from jaxlm.infer.generate import draws

        options: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed, **self.ends}
        return draws(self.decoder, self.whole, prompts, temperature, **options)

    def logps(self, batch: Mapping[str, np.ndarray], *, reference: bool) -> np.ndarray:
        """See `phases.Actor`."""
        import jax

        named = {name: batch[name] for name in ("tokens", "targets", "positions", "segments")}
        compute: Any = jax.jit(_logps, static_argnums=(0, 1, 2))  # the same function, so it is compiled once a run
        options = self.decoder, self.config.rl.temperature, self.config.train.loss_block
        with jax.default_matmul_precision(self.config.numerics.matmul):  # as in the step
            return np.asarray(compute(*options, self.reference if reference else self.params, named))

    def adapted_kl_weight(self, weight: float, kl: float, samples: int) -> float:
        """See `phases.Actor`."""
        from jaxlm.objectives.advantages import adapt_kl_weight

        rl = self.config.rl
        return adapt_kl_weight(weight, kl, target=rl.kl_target, samples=samples, horizon=rl.kl_horizon)

    def advantages(self, rewards_GN: np.ndarray, valid_GN: np.ndarray) -> np.ndarray:
        """See `phases.Actor`."""
        import jax.numpy as jnp

        from jaxlm.objectives.advantages import advantages

        dtype = jnp.promote_types(self.config.numerics.compute, "float32")
        scaling = self.config.rl.advantage
        return np.asarray(advantages(jnp.asarray(rewards_GN, dtype), jnp.asarray(valid_GN), scaling=scaling))
