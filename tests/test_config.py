"""The config tree: what a file and overrides give, and what is refused with one line."""

import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def test_a_file_states_only_what_differs(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('seed = 7\n[model]\nd_model = 64\npattern = ["attention+mlp"]\n[train]\nlearning_rate = 1e-4\n')
    found = toml.load(path, ["model.n_layers=2", 'data.source="a b"', "data.extensions=['.py']", "mesh.fsdp=8"])
    assert (found.seed, found.model.d_model, found.model.n_layers, found.train.learning_rate) == (7, 64, 2, 1e-4)
    assert (found.data.source, found.data.extensions, found.mesh.fsdp) == ("a b", (".py",), 8)
    assert found.out_dir == "runs/small"
    assert found.train.batch_size == config.Train().batch_size
    assert toml.load(path, ["data.source=stdlib", "out_dir=there"]).out_dir == "there"


def test_zeros_are_filled_in():
    model = config.Model(d_model=96, n_heads=6)
    assert (model.n_kv_heads, model.head_dim, model.d_ff) == (6, 16, 256)
    assert config.Model(d_model=96, n_heads=6, activation="gelu").d_ff == 384
    assert toml.from_dict({"data": {"seq_len": 99}}).model.max_seq_len == 99
    assert toml.from_dict({"data": {"seq_len": 99}, "model": {"max_seq_len": 256}}).model.max_seq_len == 256


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_repository_load(path):
    found = toml.load(path)
    assert toml.from_dict(tomllib.loads(toml.to_toml(found))) == found


def test_there_are_configs():
    assert CONFIGS


STAGES = {
    found.out_dir: found
    for kind in ("preference", "rl")
    for found in map(toml.load, CONFIGS[0].parent.glob(f"{kind}/*"))
}


@pytest.mark.parametrize("out_dir", sorted(name for name, cfg in STAGES.items() if cfg.train.init_from in STAGES))
def test_a_stage_has_the_model_that_it_begins_with(out_dir):
    """Also a value model's and a reward's: they read the same rows of the same tokenizer."""
    stage = STAGES[out_dir]
    for path in (stage.train.init_from, stage.rl.value_from):
        begins = STAGES[path or stage.train.init_from].model
        same = dataclasses.replace(begins, head=stage.model.head, max_seq_len=stage.model.max_seq_len)
        assert stage.model == same, f"{out_dir} begins with {path}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_modle=8", "unknown key 'model.d_modle' (did you mean 'd_model'?)"),
        ("trian.steps=8", "unknown key 'trian' (did you mean 'train'?)"),
        ("train.steps=1.5", "train.steps = 1.5: "),
        ("train.steps='8'", "train.steps = '8': input should be a valid integer"),
        ("train.steps=true", "train.steps = True: input should be a valid integer"),
        ("train.steps=0", "train.steps = 0: input should be greater than 0"),
        ("model.tie_embeddings=1", "model.tie_embeddings = 1: "),
        ("model.norm=batchnorm", "model.norm = 'batchnorm': input should be 'rmsnorm' or 'layernorm'"),
        ("model=3", "'model' is a section, not a value (write [model] and its keys below)"),
        ("steps", "override 'steps' is not of the form section.key=value"),
        ("a..c=1", "override 'a..c=1' is not of the form section.key=value"),
        ("model.moe.n_expert=4", "unknown key 'model.moe.n_expert' (did you mean 'n_experts'?)"),
        ("model.moe=3", "'model.moe' is a section, not a value (write [model.moe] and its keys below)"),
        ("seed.x=1", "override 'seed.x=1': 'seed' is not a section"),
        ("train.learning_rate=-1", "train.learning_rate = -1: input should be greater than 0"),
        ("train.microbatches=3", "train.microbatches = 3 does not divide train.batch_size = 32"),
        ("model.n_heads=3", "model.n_heads = 3 does not divide model.d_model = 256"),
        ("model.n_kv_heads=3", "model.n_kv_heads = 3 does not divide model.n_heads = 4"),
        ("model.head_dim=7", "model.head_dim = 7: rotary positions need pairs, 7 elements are odd"),
        ("model.dropout=1.0", "model.dropout = 1.0 must be below 1"),
        ("model.biases=['head']", "model.biases has 'head', which a tied head does not have"),
        ("model.pattern=[]", "model.pattern is empty"),
        ("model.pattern=['attention+mpl']", "unknown feed-forward 'mpl' in 'attention+mpl' (did you mean 'mlp'?)"),
        ("model.pattern=['atention+mlp']", "unknown mixer 'atention' in 'atention+mlp' (did you mean 'attention'?)"),
        ("model.n_layers=0", "model.n_layers = 0: input should be greater than 0"),
        ("data.validation_fraction=1.0", "data.validation_fraction = 1.0 must lie in [0, 1)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, override, message):
    path = tmp_path / "a.toml"
    path.write_text("seed = 1\n")
    with pytest.raises(UserError) as error:
        toml.load(path, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_and_positions_that_do_not_fit():
    with pytest.raises(UserError, match=r"n_layers = 3 is not a multiple of the 2 blocks"):
        toml.from_dict({"model": {"n_layers": 3, "pattern": ["attention+mlp"] * 2}})
    with pytest.raises(UserError, match=r"data\.seq_len = 64 exceeds the 32 learned positions"):
        toml.from_dict({"model": {"positions": "learned", "max_seq_len": 32}, "data": {"seq_len": 64}})


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quick.toml").write_text("x = = 1")
    (tmp_path / "latin.toml").write_bytes(b"out_dir = '\xe9'")
    for name, message in {
        "quik.toml": "no such config file (did you mean 'quick.toml'?)",
        "quick.toml": "not valid TOML",
        "latin.toml": "not valid TOML",
        ".": "is a folder (name a .toml file)",
    }.items():
        with pytest.raises(UserError) as error:
            toml.load(tmp_path / name)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_it_is_frozen_and_every_option_is_explained():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().seed = 1
    for section in sections(config.Config):
        source = inspect.getsource(section).splitlines()
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default_factory):
                continue
            at = next(i for i, line in enumerate(source) if line.startswith(f"    {field.name}: "))
            assert source[at + 1].startswith('    """'), f"{section.__name__}.{field.name} has no docstring"


def sections(cls):
    """A section and those inside it."""
    inside = [field.default_factory for field in dataclasses.fields(cls)]
    return [cls, *(one for part in inside if dataclasses.is_dataclass(part) for one in sections(part))]


def test_a_block_has_options_of_its_own():
    model = config.Model(
        pattern=(
            "attention(window=8, rope_theta=1e6)+mlp(activation=gelu)",
            "mamba(d_state=4)",
            "attention+moe(top_k=1)",
        ),
        n_layers=6,
        d_ff=96,
        moe=config.MoE(n_experts=4),
    )
    first, second, third = (model.halves(kind) for kind in model.pattern)
    assert (first.mixer.window, first.mixer.rope_theta, first.ffn.activation) == (8, 1e6, "gelu")
    assert (second.mixer.mamba.d_state, second.mixer.mamba.expand, second.ffn_name) == (4, 2, "")
    assert (third.mixer.window, third.ffn.moe.top_k, third.ffn.moe.n_experts, third.ffn.d_ff) == (0, 1, 4, 96)
    assert [rope.theta for rope in model.ropes] == [1e6, 1e4]
    assert first.mixer.residual_std == model.init_std / 12**0.5
    assert second.mixer.residual_std == model.init_std / 6**0.5


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("atention+mlp", "unknown mixer 'atention' in 'atention+mlp' (did you mean 'attention'?)"),
        ("attention+mpl", "unknown feed-forward 'mpl' in 'attention+mpl' (did you mean 'mlp'?)"),
        ("attention(windw=3)+mlp", "unknown option 'windw' in 'attention(windw=3)+mlp' (did you mean 'window'?)"),
        ("attention(window=x)+mlp", "window"),
        ("attention(window)+mlp", "'window' in 'attention(window)+mlp' is not of the form key=value"),
        ("attention+", "'attention+' is not of the form"),
        ("mamba(d_conv=0)", "d_conv"),
        ("attention(head_dim=7)+mlp", "model.head_dim = 7"),
        ("attention+moe(top_k=9)", "model.moe.top_k = 9 is more than model.moe.n_experts = 8"),
        ("attention+moe(n_groups=3)", "model.moe.n_groups = 3 does not divide model.moe.n_experts = 8"),
        ("attention+moe(n_groups=8, top_groups=4)", "model.moe.n_groups = 8: a group of 1 expert has no two best"),
        ("attention+moe(n_groups=2, top_groups=3)", "model.moe.top_groups = 3 is more than model.moe.n_groups = 2"),
        (
            "attention+moe(n_groups=2, top_k=4)",
            "model.moe.top_groups = 1: groups of 4 experts leave top_k = 4 no",
        ),
    ],
)
def test_a_block_that_is_none_is_refused(block, message):
    with pytest.raises(UserError) as refused:
        toml.from_dict({"model": {"pattern": [block]}})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


PRESETS = sorted(path.stem for path in registry.MESHES.glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_mesh_has_a_name(tmp_path, name):
    path = tmp_path / "a.toml"
    path.write_text(f'mesh = "{name}"\n')
    found = toml.load(path)
    assert set(tomllib.loads((registry.MESHES / f"{name}.toml").read_text())) == {"mesh"}
    assert toml.from_dict({"mesh": registry.mesh(name)}).mesh == found.mesh
    path.write_text("[mesh]\ntensor = 4\n[mesh.rules]\nheads = []\n")
    assert toml.load(path, [f"mesh={name}"]).mesh == found.mesh
    assert toml.from_dict(tomllib.loads(toml.to_toml(found))) == found


def test_overrides_change_a_named_mesh_in_their_order(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('mesh = "zero1"\n')
    found = toml.load(path, ["mesh.data=4", "mesh.rules.vocab=['tensor', 'fsdp']", "mesh.dcn.data=2"]).mesh
    assert (found.data, found.dcn.data, found.rules) == (4, 2, {"vocab": ("tensor", "fsdp")})
    assert found.optimizer_rules == {"embed": ("fsdp", "data")}
    assert toml.load(path, ["mesh.data=4", "mesh=zero3"]).mesh == config.Mesh(data=1, fsdp=-1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh=multslice", "mesh = 'multslice': no such preset (did you mean 'multislice'?)"),
        ("mesh=../models/dense-134m", "no such preset (valid: "),
        ("mesh.dnc.data=2", "unknown key 'mesh.dnc' (did you mean 'dcn'?)"),
        ("mesh.dcn=2", "'mesh.dcn' is a section, not a value"),
        ("mesh.dcn.data=0", "mesh.dcn.data = 0 must be positive or -1"),
        ("mesh.rules.embed=fsdp", "mesh.rules.embed = 'fsdp': input should be a valid"),
        ("mesh.rules=3", "mesh.rules = 3: input should be an object"),
    ],
)
def test_what_is_wrong_with_a_mesh_is_named(tmp_path, override, message):
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(UserError) as error:
        toml.load(tmp_path / "a.toml", [override])
    assert message in str(error.value) and "\n" not in str(error.value)
