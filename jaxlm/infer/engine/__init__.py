"""Many requests at once, on rows that come and go: `Engine` answers each `Request` by a `Reply`. No framework here."""

from jaxlm.infer.engine.engine import Engine
from jaxlm.infer.engine.reply import Reply
from jaxlm.infer.engine.request import Choice, Grammar, LogProb, Part, Request, Result, Usage

__all__ = ["Choice", "Engine", "Grammar", "LogProb", "Part", "Reply", "Request", "Result", "Usage"]
