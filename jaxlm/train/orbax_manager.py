"""Orbax's manager of checkpoints, without its part in preemptions."""

from __future__ import annotations

from jaxlm.processes.orbax_silence import OrbaxSilence

with OrbaxSilence():
    import orbax.checkpoint as ocp


class OrbaxManager(ocp.CheckpointManager):
    """A manager that never asks the preemption service: the loop does, by `processes.stop_signals`.

    The service lets all processes stop at the number after the last that one of them asked for. Orbax asks with the
    number of the step, the loop with that of a point, which is larger: a notice that came just after Orbax had asked
    was for a point that was over, and was lost.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never; the loop saves when it stops."""
        return False
