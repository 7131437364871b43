"""Reports as people and scripts read them: tables, JSON, the registry and the dump folder."""

import json
import logging
import threading

import pytest
from expecttest import assert_expected_inline

from fa3_inductor import GraphReport, Reason, Report, Site, clear_reports, config, reports
from fa3_inductor.report import dump, record, recording_nothing

FUSED = Site(
    "fused",
    mask="causal",
    target="hopper",
    kernel="forward_16bit",
    detail="head_dim 32 is padded to 64",
    source="/home/user/gpt/model.py:41",
    code="y = att @ v",
    form="matmul",
    q_shape=(2, 4, 64, 32),
    k_shape=(2, 4, 64, 32),
    v_shape=(2, 4, 64, 32),
    dtype="bfloat16",
    scale="0.125",
    node="y",
    flops=4_194_304,
    score_bytes=131_072,
)
REJECTED = Site(
    "rejected",
    Reason.WEIGHTS_USED,
    "returned by the graph",
    source="/home/user/gpt/probe.py:7",
    code="return att @ v, att",
    form="matmul",
    q_shape=("s0", 8, 16),
    k_shape=("s0", 12, 16),
    v_shape=("s0", 12, 16),
    dtype="float32",
)


def test_table():
    report = Report([GraphReport("graph_0", [FUSED, REJECTED])], ["print() at model.py:3"])
    assert_expected_inline(
        str(report),
        """\
1 graph, 2 attentions: 1 fused, 1 left as written; 131.1 kB of scores no longer materialised
#  source       form    q, k, v                      dtype     mask    runs on / why not     FLOPs  scores
-  -----------  ------  ---------------------------  --------  ------  --------------------  -----  --------
1  model.py:41  matmul  2x4x64x32                    bfloat16  causal  hopper/forward_16bit  4.2 M  131.1 kB
   head_dim 32 is padded to 64
2  probe.py:7   matmul  s0x8x16, s0x12x16, s0x12x16  float32   ?       rejected              ?      ?
   WEIGHTS_USED: the attention weights are used elsewhere, so they have to exist (returned by the graph)
   > return att @ v, att
graph break 1: print() at model.py:3""",
    )


def test_table_of_a_graph_that_failed():
    assert_expected_inline(
        str(GraphReport("graph_1", error="the graph could not be captured: boom")),
        """\
1 graph, 0 attentions: 0 fused, 0 left as written
graph graph_1 was left unchanged: the graph could not be captured: boom""",
    )


def test_empty_report():
    assert_expected_inline(str(Report()), """0 graphs, 0 attentions: 0 fused, 0 left as written""")


def test_counts():
    report = Report([GraphReport("a", [FUSED]), GraphReport("b", [REJECTED, FUSED])])
    assert report.sites == [FUSED, REJECTED, FUSED]
    assert report.fused == [FUSED, FUSED]
    assert report.rejected == [REJECTED]


def test_dict_survives_json():
    report = Report([GraphReport("graph_0", [FUSED, REJECTED], {"capture": 0.5}, None)], ["print()"])
    read = json.loads(json.dumps(report.to_dict()))
    assert (read["fused"], read["rejected"], read["graph_breaks"]) == (1, 1, ["print()"])
    (graph,) = read["graphs"]
    assert (graph["name"], graph["seconds"], graph["error"]) == ("graph_0", {"capture": 0.5}, None)
    fused, rejected = graph["sites"]
    assert (fused["reason"], fused["q_shape"], fused["flops"]) == (None, [2, 4, 64, 32], 4_194_304)
    assert (rejected["reason"], rejected["q_shape"], rejected["flops"]) == ("WEIGHTS_USED", ["s0", 8, 16], None)
    assert set(fused) == set(Site.__dataclass_fields__)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (131_072, "131.1 kB"),
        (34_359_738_368, "34.4 GB"),
        (2e18, "2000.0 PB"),
    ],
)
def test_sizes_have_prefixes(value, text):
    site = Site("fused", score_bytes=value)
    assert f"  {text}\n" in str(GraphReport("g", [site])) + "\n"


def test_registry_is_process_wide():
    thread = threading.Thread(target=record, args=(GraphReport("elsewhere"),))
    thread.start()
    thread.join()
    record(GraphReport("here"))
    assert [graph.name for graph in reports().graphs] == ["elsewhere", "here"]
    with recording_nothing():
        record(GraphReport("apart"))
    assert len(reports().graphs) == 2
    clear_reports()
    assert reports().graphs == []


def test_dump(tmp_path):
    dump(GraphReport("unwritten"), "", "")
    with config.patch(dump_dir=str(tmp_path / "dumps")):
        with recording_nothing():
            dump(GraphReport("apart"), "", "")
        for _ in range(2):
            dump(GraphReport("graph 0/1", [FUSED]), "before = 1", "after = 2\n")
    (process,) = (tmp_path / "dumps").iterdir()
    folders = sorted(process.iterdir())
    assert len(folders) == 2 and all(folder.name.endswith("_graph_0_1") for folder in folders)
    assert {path.name: path.read_text() for path in folders[0].glob("*.py")} == {
        "before.py": "before = 1\n",
        "after.py": "after = 2\n",
    }
    assert json.loads((folders[0] / "report.json").read_text())["sites"][0]["mask"] == "causal"
    assert "model.py:41" in (folders[0] / "report.txt").read_text()


def test_dump_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with config.patch(dump_dir=str(tmp_path / "file")), caplog.at_level(logging.WARNING):
        dump(GraphReport("graph_0"), "", "")
    assert "could not write the dump of graph graph_0" in caplog.text
