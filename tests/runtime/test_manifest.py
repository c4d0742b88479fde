"""``flrc.json``: what it accepts, and a typed error for everything else."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flrc_runtime import manifest
from flrc_runtime.errors import FlrcError, FormatError, VerificationError
from flrc_runtime.manifest import (
    Manifest,
    ModelInfo,
    ProjectionPlan,
    RankPlan,
    Schedule,
    break_even,
    factor_parameters,
    seal,
)

INFO = ModelInfo("m", "llama", 32, 8, 1, 2, 1, 4, 64, (2,), 1000)
PLAN = RankPlan(
    "spectrum",
    (0.9, 0.7, 0.5),
    (
        ProjectionPlan("a", (8, 8), (None, None, None)),
        ProjectionPlan("b", (8, 16), (5, 3, 3)),
        ProjectionPlan("c", (4, 8), (2, 2, 2), storage="pivoted"),
    ),
    {"a": 1.5},
)


def content(**change: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "checkpoint", "model": INFO, "plan": PLAN, "schedule": Schedule((4, 9), 16, ((0.1,),) * 3, 16),
        "dtype": "float32", "factorization": "two-sided", "versions": {"flrc-edge": "0"},
        "calibration": manifest.Calibration((manifest.TextSource("t", "0", 1.0, 9),), 9, 3, 0, "f"),
    }  # fmt: skip
    return Manifest(**{**values, **change})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder of two files and those every checkpoint needs."""
    target = tmp_path / "folder"
    target.mkdir()
    for name in content().required_files():
        (target / name).write_bytes(b"{}")
    (target / "one.bin").write_bytes(b"12345")
    (target / "two.txt").write_text("hello")
    seal(target, content())
    return target


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "flrc.json").read_text())
    change(raw)
    (folder / "flrc.json").write_text(json.dumps(raw))


def test_seal_and_read(folder: Path) -> None:
    found = manifest.read(folder, "checkpoint")
    assert manifest.verify(folder) == found
    assert {n: f.size for n, f in found.files.items()} == {
        "one.bin": 5, "two.txt": 5, **dict.fromkeys(found.required_files(), 2)
    }  # fmt: skip
    assert asdict(found) == {**asdict(content()), "files": {n: asdict(f) for n, f in found.files.items()}}
    assert isinstance(found.plan.projections[1], ProjectionPlan) and found.plan == PLAN
    assert seal(folder, found) == found  # sealing again does not list flrc.json itself


def test_a_real_bundle(bundle: Any) -> None:
    found = manifest.verify(bundle.folder)
    assert found.kind == "bundle" and len(found.stages) == 2 and "weights.bin" in found.files


def test_plan_arithmetic() -> None:
    b = PLAN.projections[1]
    assert b.chunks() == ((0, 3), (3, 5)) and PLAN.projections[0].chunks() == ()
    assert PLAN.projections[2].chunks() == ((0, 2),)
    assert [b.parameters(s) for s in range(3)] == [120, 72, 72] and PLAN.projections[0].parameters(2) == 64
    assert PLAN.dense_parameters == 64 + 128 + 32
    assert PLAN.activated(0) == 64 + 120 + 20 and PLAN.kept(1) == (64 + 72 + 20) / 224
    assert PLAN.num_stages == 3 and list(PLAN.by_name()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((8, 16), (3,), [3 * 24 - 9]),
        ((16, 8), (3, 3), [63, 63]),
        ((8, 16), (5, 3, 3), [63 + 2 * 24 - 4, 63, 63]),
        ((8, 16), (7, 5, 3), [63 + 44 + 44, 63 + 44, 63]),
        ((8, 16), (8,), [8 * 16]),  # all ranks in one chunk are the matrix itself
        ((8, 8), (8, 8), [64, 64]),
        # Two chunks up to the full rank hold the matrix and the choice of its part of rank 3: 2 * 3 * 5 more.
        ((8, 16), (8, 3), [8 * 16 + 30, 63]),
        ((8, 16), (1, 1), [8 + 16 - 1] * 2),
    ],
)
def test_parameters_of_pivoted_factors(
    shape: tuple[int, int], ranks: tuple[int, ...], expected: list[int]
) -> None:
    plan = ProjectionPlan("p", shape, ranks, storage="pivoted")
    assert [plan.parameters(s) for s in range(len(ranks))] == expected
    plain = ProjectionPlan("p", shape, ranks)
    assert plain.storage == "plain" and plain.chunks() == plan.chunks()
    assert [plain.parameters(s) for s in range(len(ranks))] == [sum(shape) * r for r in ranks]


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 8), (2, 3), (1, 9), (1, 1)])
def test_pivoted_factors_are_smaller_below_the_full_rank(shape: tuple[int, int]) -> None:
    m, n = shape
    most = break_even(shape, storage="pivoted")
    sizes = [factor_parameters(shape, r, storage="pivoted") for r in range(min(m, n) + 1)]
    assert most == min(m, n) - 1 and all(size < m * n for size in sizes[: most + 1]) and sizes[-1] == m * n
    assert sizes == sorted(sizes)


def test_the_matrices_of_a_projection_and_their_formats() -> None:
    stages = (5, 3, 3)
    shapes = ((3, 16), (8, 3), (2, 16), (8, 2))
    names = ("chunks.0.V", "chunks.0.U", "chunks.1.V", "chunks.1.U")
    formats = ("int4/32", "int8/64", "int2/128", "fp32")
    plain = ProjectionPlan("p", (8, 16), stages, formats=formats)
    assert plain.matrices() == dict(zip(names, shapes, strict=True))
    assert [plain.format_of(name) for name in names] == list(formats)
    pivoted = ProjectionPlan("p", (8, 16), stages, storage="pivoted")
    assert pivoted.matrices()["chunks.0.U"] == (5, 3) and pivoted.matrices()["chunks.1.U"] == (6, 2)
    assert sum(m * n for m, n in pivoted.matrices().values()) == pivoted.parameters(0)
    assert {pivoted.format_of(name) for name in names} == {""}
    dense = ProjectionPlan("p", (8, 16), (None,), formats=("int8/32",))
    assert dense.matrices() == {"weight": (8, 16)} and dense.format_of("weight") == "int8/32"


def test_an_unknown_storage() -> None:
    with pytest.raises(FormatError, match="p: storage 'sparse' is unknown"):
        ProjectionPlan("p", (8, 8), (3,), storage="sparse")  # type: ignore[arg-type]


def test_schedule_stages() -> None:
    schedule = Schedule((4, 4, 9))
    assert [schedule.stage_at(t) for t in (0, 3, 4, 8, 9, 10**9)] == [0, 0, 2, 2, 3, 3]
    assert Schedule(()).stage_at(5) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=1), "written in format 1, this flrc-edge reads 2 and 3"),
        (lambda c: c.update(schema_version=4), "written in format 4, this flrc-edge reads 2 and 3"),
        (lambda c: c.update(operators=-1), "operators must be a number from 0 on"),
        (lambda c: c.pop("schema_version"), "written in format None"),
        (lambda c: c.update(schema_version="2"), "written in format 2, this"),
        (lambda c: c.update(schema_version=True), "written in format True, this"),
        (lambda c: c.update(schema_version=2.0), "expected int, found float"),
        (lambda c: c.update(extra=1), "unknown field 'extra'"),
        (lambda c: c["model"].update(extra=1), r"flrc.json.model: unknown field 'extra'"),
        (lambda c: c.pop("plan"), "missing 1 required"),
        (lambda c: c["model"].pop("head_dim"), "missing 1 required"),
        (lambda c: c.update(kind="folder"), "'folder' is not one of checkpoint, bundle"),
        (lambda c: c.update(kind="bundle"), "a bundle of this plan has 3 stage graphs"),
        (lambda c: c.update(dtype=None), "dtype: expected str, found NoneType"),
        (lambda c: c.update(model=[]), "model: expected an object"),
        (lambda c: c.update(stages={}), "stages: expected a list"),
        (lambda c: c.update(files=[]), "files: expected an object"),
        (lambda c: c["model"].update(vocab_size=0), "vocab_size must be a positive integer"),
        (lambda c: c["model"].update(num_layers=1.5), "num_layers: expected int, found float"),
        (lambda c: c["model"].update(num_layers=True), "num_layers: expected int, found bool"),
        (lambda c: c["model"].update(context_length=-1), "context_length must be a positive integer"),
        (lambda c: c["model"].update(eos_token_ids=[32]), "must lie inside the vocabulary"),
        (lambda c: c["model"].update(eos_token_ids=[-1]), "must lie inside the vocabulary"),
        (lambda c: c["plan"].update(keep=[]), "1 to 64 stages"),
        (lambda c: c["plan"].update(keep=[0.5] * 65), "1 to 64 stages"),
        (lambda c: c["plan"].update(keep=[0.9, 0.7, 0]), r"must lie in \(0, 1\]"),
        (lambda c: c["plan"].update(keep=[1.1, 0.7, 0.5]), r"must lie in \(0, 1\]"),
        (lambda c: c["plan"].update(keep=[0.9, 0.5, 0.7]), "must not grow"),
        (lambda c: c["plan"].update(keep=[0.9, 0.5]), "one rank a stage"),
        (lambda c: c["plan"]["projections"][1].update(name="a"), "listed twice"),
        (lambda c: c["plan"]["projections"][1].update(ranks=[9, 3, 3]), "between 1 and 8"),
        (lambda c: c["plan"]["projections"][1].update(ranks=[5, 3, 0]), "between 1 and 8"),
        (lambda c: c["plan"]["projections"][1].update(ranks=[3, 5, 5]), "must not grow over stages"),
        (lambda c: c["plan"]["projections"][1].update(ranks=[5, 3, None]), "dense at some stages"),
        (lambda c: c["plan"]["projections"][1].update(shape=[8, 0]), "two positive integers"),
        (lambda c: c["plan"]["projections"][1].update(shape=[8]), "expected 2 entries"),
        (
            lambda c: c["plan"]["projections"][1].update(storage="sparse"),
            "'sparse' is not one of plain, pivoted",
        ),
        (lambda c: c["plan"]["projections"][1].update(storage=None), "None is not one of plain, pivoted"),
        (lambda c: c["plan"]["projections"][0].update(formats=["int3/32"]), "a: a format of .* is unknown"),
        (lambda c: c["plan"]["projections"][0].update(formats=["fp32"] * 2), "a: 1 matrices need as many"),
        (lambda c: c["plan"]["projections"][1].update(formats=["fp32"] * 2), "b: 4 matrices need as many"),
        (lambda c: c["plan"]["projections"][0].update(formats=["fp32"]), "some number formats are given"),
        (lambda c: c["plan"].update(embedding="int4"), "plan.embedding 'int4' is unknown"),
        (lambda c: c["plan"].update(embedding="int4/32"), "some number formats are given"),
        (lambda c: c["plan"]["candidates"].update(a=10**400), "out of range"),
        (lambda c: c["plan"]["scores"].update(a=10**400), "out of range"),
        (lambda c: c["calibration"]["texts"][0].update(weight=10**400), "out of range"),
        (lambda c: c["schedule"].update(boundaries=[4]), "3 stages need 2 schedule boundaries"),
        (lambda c: c["schedule"].update(boundaries=[9, 4]), "must not fall"),
        (lambda c: c["schedule"].update(boundaries=[0, 4]), "positive integers"),
        (lambda c: c["schedule"].update(divergence=[[0.1]]), "one row a stage"),
        (lambda c: c["schedule"].update(divergence=[[]] * 3), "one row a stage"),
        (lambda c: c["schedule"].update(divergence=[[0.1], [0.1], []]), "one row a stage"),
        (lambda c: c["files"]["one.bin"].update(size="5"), "expected int, found str"),
    ],
)
def test_wrong_content(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        manifest.read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ('{"kind": "checkpoint", "kind": "bundle"}', "a key appears twice"),
        ('{"schema_version": NaN}', "NaN is not a finite number"),
        ('{"schema_version": 1e999}', "1e999 is not a finite number"),
    ],
)
def test_no_manifest(folder: Path, text: str, message: str) -> None:
    (folder / "flrc.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        manifest.read(folder)


def test_every_prefix_is_refused(folder: Path) -> None:
    text = (folder / "flrc.json").read_text().rstrip()
    for stop in range(0, len(text), 7):
        (folder / "flrc.json").write_text(text[:stop])
        with pytest.raises(FormatError):
            manifest.read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "C:\\x", "one.bin\x00", ""])
def test_path_tricks(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("hello")
    edit(folder, lambda c: c["files"].update({name: c["files"]["one.bin"]}))
    for reader in (manifest.read, manifest.verify):
        with pytest.raises(VerificationError, match="is not a plain file name"):
            reader(folder)


def test_links(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"12345")
    (folder / "one.bin").unlink()
    (folder / "one.bin").symlink_to(folder.parent / "secret")
    with pytest.raises(VerificationError, match=r"one.bin is not a regular file"):
        manifest.read(folder)
    (folder / "flrc.json").rename(folder.parent / "elsewhere.json")
    (folder / "flrc.json").symlink_to(folder.parent / "elsewhere.json")
    with pytest.raises(FormatError, match=r"flrc.json is a link"):
        manifest.read(folder)


def test_files_that_changed(folder: Path) -> None:
    (folder / "one.bin").write_bytes(b"12346")  # one byte, the same size
    assert manifest.read(folder).kind == "checkpoint"
    with pytest.raises(VerificationError, match=r"checksum mismatch in one.bin"):
        manifest.verify(folder)
    (folder / "one.bin").write_bytes(b"1234")
    with pytest.raises(VerificationError, match=r"one.bin has 4 bytes, 5 were written"):
        manifest.read(folder)
    (folder / "one.bin").unlink()
    with pytest.raises(VerificationError, match=r"one.bin is missing"):
        manifest.read(folder)


def test_a_file_that_is_not_listed(folder: Path) -> None:
    (folder / "new").write_text("x")
    assert manifest.read(folder)
    with pytest.raises(VerificationError, match=r"new is not listed in flrc.json"):
        manifest.verify(folder)


def test_the_wrong_kind_and_no_folder(folder: Path) -> None:
    with pytest.raises(FormatError, match="folder is a checkpoint, not a bundle") as caught:
        manifest.read(folder, "bundle")
    assert caught.value.hint == "flrc-edge export writes a bundle" and caught.value.exit_code == 3
    for path in (folder / "one.bin", folder / "nowhere"):
        with pytest.raises(FormatError, match="is not a folder"):
            manifest.read(path)
    (folder / "flrc.json").unlink()
    with pytest.raises(FormatError, match=r"folder/flrc.json is missing"):
        manifest.read(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(p for key, inner in items for p in places(inner, (*path, key)))][0 if path else 1 :]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_is_read_or_refused_by_name(folder: Path, data: Any) -> None:
    """Whatever a value is replaced with: a manifest, or an error of ours."""
    target = folder.parent / "fuzz"
    if not target.exists():
        shutil.copytree(folder, target)
    raw = copy.deepcopy(json.loads((folder / "flrc.json").read_text()))
    place = data.draw(st.sampled_from(places(raw)))
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = data.draw(json_values)
    (target / "flrc.json").write_text(json.dumps(raw))
    try:
        found = manifest.verify(target)
    except FlrcError as error:
        assert error.exit_code == 3 and str(error)
    else:
        assert (found.plan.num_stages == 3 and found.schedule.stage_at(10) == 2) or place[0] in (
            "schedule",
            "plan",
        )


@pytest.mark.parametrize("name", content().required_files())
def test_a_needed_file_that_is_not_listed(folder: Path, name: str) -> None:
    edit(folder, lambda raw: raw["files"].pop(name))
    with pytest.raises(FormatError, match="does not list"):
        manifest.read(folder)


def test_a_pipe_instead_of_the_manifest(folder: Path) -> None:
    (folder / "flrc.json").unlink()
    os.mkfifo(folder / "flrc.json")
    with pytest.raises(FormatError, match="not a regular file"):
        manifest.read(folder)


def test_a_plan_without_projections() -> None:
    with pytest.raises(FormatError, match="empty"):
        RankPlan("spectrum", (0.9,), ())


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ((), "model", []),
        (("model",), "vocab_size", 511),
        (("model",), "context_length", None),
        (("model",), "decoder", "stage_0.onnx"),
        (("model", "decoder"), "num_hidden_layers", 6),
        (("model", "decoder"), "num_key_value_heads", 8),
        (("model", "decoder"), "num_attention_heads", 4),
        (("model", "decoder"), "head_size", "8"),
        (("model", "decoder"), "hidden_size", 128),
        (("model", "decoder"), "filename", "../other.onnx"),
    ],
)
def test_a_genai_file_that_disagrees(
    stock: Path, tmp_path: Path, part: tuple[str, ...], field: str, value: Any
) -> None:
    copied = Path(shutil.copytree(stock, tmp_path / "copy"))
    path = copied / "genai_config.json"
    raw = json.loads(path.read_text())
    place = raw
    for name in part:
        place = place[name]
    place[field] = value
    path.write_text(json.dumps(raw))
    seal(copied, manifest.parse(copied))  # as a hostile writer would: every checksum is right
    with pytest.raises(VerificationError, match=r"copy: genai_config\.json (says|names) "):
        manifest.verify(copied)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("bundle", "a bundle"), ("checkpoint", "a checkpoint"), (None, "a checkpoint or bundle")],
)
def test_a_model_that_was_not_compressed_is_named(tmp_path: Path, kind: Any, named: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=f"is a Hugging Face model, not {named}") as caught:
        manifest.read(tmp_path, kind)
    assert caught.value.hint is not None and caught.value.hint.startswith("flrc-edge compress")
