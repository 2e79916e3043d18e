"""A run may go on with any other mesh and other rules, and says what has changed."""

from jaxlm.config import toml
from jaxlm.recipes import make_recipe
from jaxlm.recipes.start import open_stage
from jaxlm.run.directory import write_run


def test_a_run_keeps_its_mesh_and_says_what_changes(runs, tmp_path, capsys):
    cfg = runs.config(tmp_path, "mesh=zero1", "mesh.rules.heads=[]")
    cfg, _, source = open_stage(cfg, make_recipe(cfg), resume=False)
    write_run(cfg, source.tokenizer)
    assert toml.load(tmp_path / "config.toml").mesh == cfg.mesh
    capsys.readouterr()
    again = runs.config(tmp_path, "mesh=multislice", "mesh.rules.embed=[]")
    again, *_ = open_stage(again, make_recipe(again), resume=True)
    assert (again.mesh.dcn.data, again.mesh.rules) == (-1, {"embed": ()})
    assert capsys.readouterr().out.splitlines() == [
        "warning: resuming with mesh.data = 1, was -1",
        "warning: resuming with mesh.fsdp = -1, was 1",
        "warning: resuming with mesh.dcn.data = -1, was 1",
        "warning: resuming with mesh.rules.heads = None, was []",
        "warning: resuming with mesh.rules.embed = [], was None",
        "warning: resuming with mesh.optimizer_rules.embed = None, was ['fsdp', 'data']",
    ]
