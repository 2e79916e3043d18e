"""A run may go on with any other mesh and other rules, and says what has changed."""

from jaxlm.config import toml
from jaxlm.run.directory import open_run, write_run


def test_a_run_keeps_its_mesh_and_says_what_changes(runs, tmp_path, capsys):
    cfg, corpus = open_run(runs.config(tmp_path, "mesh=zero1", "mesh.rules.heads=[]"), resume=False)
    write_run(cfg, corpus)
    assert toml.load(tmp_path / "config.toml").mesh == cfg.mesh
    capsys.readouterr()
    again, _ = open_run(runs.config(tmp_path, "mesh=multislice", "mesh.rules.embed=[]"), resume=True)
    assert (again.mesh.dcn.data, again.mesh.rules) == (-1, {"embed": ()})
    assert capsys.readouterr().out.splitlines() == [
        "warning: resuming with mesh.data = 1, was -1",
        "warning: resuming with mesh.fsdp = -1, was 1",
        "warning: resuming with mesh.dcn.data = -1, was 1",
        "warning: resuming with mesh.rules.heads = None, was []",
        "warning: resuming with mesh.rules.embed = [], was None",
        "warning: resuming with mesh.optimizer_rules.embed = None, was ['fsdp', 'data']",
    ]
