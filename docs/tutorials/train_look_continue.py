# %% [markdown]
# # Train, look, continue
#
# A small model of Python, trained in a minute on a CPU; what the run has to show; and the same run, continued.
# This file is a notebook as text: open it with Jupytext or an editor that knows `# %%`, or run it with Python.

# %%
import numpy as np

import jaxlm

OVERRIDES = [
    "out_dir=runs/tutorial",
    "model.d_model=64",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "tokenizer.vocab_size=512",
    "data.seq_len=64",
    "train.steps=40",
    "train.warmup_steps=10",
    "eval.every=20",
    "checkpoint.every=20",
    "log.every=5",
]

# %% [markdown]
# ## Train
#
# A config is a value. It names everything that decides what is trained; an override has the same name as in the file.

# %%
config = jaxlm.load_config("quickstart", OVERRIDES)
run = jaxlm.train(config, resume=True)
print(run)

# %% [markdown]
# ## Look
#
# A run is its folder. `metrics` are rows for a table, `column` is one of them against the step.

# %%
steps, losses = run.column("loss")
print(f"loss {losses[0]:.2f} at step {steps[0]}, {losses[-1]:.2f} at step {steps[-1]}")
print("checkpoints at", run.checkpoints)
assert losses[-1] < losses[0]

# %% [markdown]
# A model is a value, too: the architecture, the parameters and the tokenizer in one.

# %%
model = run.model()
print(model)
print(model.generate("def add(a, b):", max_new_tokens=16).text)
surprise = -model.log_probs("import os\n")
print("nats of each token:", np.round(surprise, 2))

# %% [markdown]
# An earlier checkpoint is the same call with a step.

# %%
earlier = run.model(step=run.checkpoints[0])
before, now = (-one.log_probs("import os\n").mean() for one in (earlier, model))
print(f"{before:.2f} nats a token at step {run.checkpoints[0]}, {now:.2f} at the end")

# %% [markdown]
# ## Continue
#
# More steps are the same config with more steps: the run goes on where it stopped, bit for bit as if it never had.

# %%
run = jaxlm.train(jaxlm.load_config("quickstart", [*OVERRIDES, "train.steps=60"]), resume=True)
assert run.checkpoints[-1] == 60
print(run.column("loss")[1][-1])

# %% [markdown]
# `runs/tutorial/report.html` shows the whole run on one page.
