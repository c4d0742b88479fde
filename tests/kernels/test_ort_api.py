"""Our table of functions against onnxruntime's own header: places, parameters, fields of a custom operator."""

from __future__ import annotations

import re
from pathlib import Path

OURS = (Path(__file__).parents[2] / "runtime" / "kernels" / "ort_api.h").read_text()


def struct(header: str, name: str) -> str:
    """Return the body of a struct without comments."""
    start = header.index(f"struct {name} {{")
    body = header[start : start + re.search(r"^};", header[start:], re.M).start()]  # type: ignore[union-attr]
    return re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", body), flags=re.S)


def entries(header: str) -> list[str]:
    """Return the names of the functions of OrtApi, in their order."""
    pattern = r"ORT_API2_STATUS\(\s*(\w+)|ORT_CLASS_RELEASE2?\((\w+)\)|\(\s*(?:ORT_API_CALL\s*)?\*\s*(\w+)\s*\)\s*\("
    found = re.findall(pattern, struct(header, "OrtApi"))
    return [plain or (release and f"Release{release}") or other for plain, release, other in found]


def test_entries_are_in_their_places(header: str) -> None:
    names = entries(header)
    assert names[:3] == ["CreateStatus", "GetErrorCode", "GetErrorMessage"]
    ours = re.findall(r"entry\((\w+), (\d+),", OURS)
    assert len(ours) >= 15
    for name, place in ours:
        assert names.index(name) == int(place), name
    released = dict(re.findall(r"FLRC_ORT_RELEASE_(\w+) (\d+)", OURS))
    theirs = {"STATUS": "ReleaseStatus", "SHAPE": "ReleaseTensorTypeAndShapeInfo"}
    assert {key: names[int(place)] for key, place in released.items()} == theirs


def test_entries_take_as_many_parameters(header: str) -> None:
    body = struct(header, "OrtApi")
    for name, signature in re.findall(r"entry\((\w+), \d+,\s*\\?\s*\((.*?)\)\)\s*\\?$", OURS, re.M | re.S):
        if name == "CreateStatus":
            continue  # declared in another way
        theirs = re.search(rf"ORT_API2_STATUS\({name},(.*?)\);", body, re.S)
        assert theirs is not None, name
        flat = re.sub(r"\([^()]*\)\s*\([^()]*\)", "f", theirs[1])  # a parameter that is a function
        mine = re.sub(r"\([^()]*\)\s*\([^()]*\)", "f", signature)
        assert flat.count(",") == mine.count(","), name


def test_fields_of_a_custom_operator_are_in_their_order(header: str) -> None:
    theirs = re.findall(r"\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)", struct(header, "OrtCustomOp"))
    ours = re.findall(r"\(\*(\w+)\)\(", OURS[OURS.index("struct OrtCustomOp {") :])
    same = {
        "CreateKernelV2": "create_kernel_2", "KernelComputeV2": "compute_2", "KernelCompute": "compute",
        "KernelDestroy": "destroy_kernel", "InferOutputShapeFn": "infer_shape", "GetInputTypeCount": "get_input_count",
        "GetOutputTypeCount": "get_output_count", "GetExecutionProviderType": "get_execution_provider",
        "GetInputMemoryType": "get_input_memory", "GetStartVersion": "get_first_version",
        "GetEndVersion": "get_last_version", "GetVariadicInputMinArity": "get_variadic_input_least",
        "GetVariadicInputHomogeneity": "get_variadic_input_alike", "GetAliasMap": "get_alias",
        "GetVariadicOutputMinArity": "get_variadic_output_least", "ReleaseAliasMap": "release_alias",
        "GetVariadicOutputHomogeneity": "get_variadic_output_alike",
    }  # fmt: skip
    expected = [same.get(name) or re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in theirs]
    assert ours == expected
