"""Peak arithmetic of GPUs: the denominator of MFU.

Dense figures (NVIDIA's sheets print the double of them, with structured sparsity), in TFLOP/s: half precision on tensor cores
with fp32 accumulation, and fp32 outside of them (torch doesn't use TF32 for matrix products unless told to).
"""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of one device; `source` is the document the figures stand in."""

    bf16: float | None  # None: no bf16 tensor cores
    fp16: float
    fp32: float
    source: str


# Every word of a key must be in the device's name as CUDA gives it, case ignored; the first key that fits counts, so
# variants come before the plain name.
PEAKS: dict[tuple[str, ...], Peak] = {
    ("GB300",): Peak(2500, 2500, 80, "NVIDIA GB300 NVL72 data sheet, 2025"),
    ("B300",): Peak(2250, 2250, 75, "NVIDIA HGX B300 data sheet, 2025"),
    ("GB200",): Peak(2500, 2500, 80, "NVIDIA GB200 NVL72 data sheet, 2024"),
    ("B200",): Peak(2250, 2250, 75, "NVIDIA HGX B200 data sheet, 2024"),
    ("GH200",): Peak(989.5, 989.5, 67, "NVIDIA GH200 Grace Hopper Superchip data sheet, 2023"),
    ("H200", "NVL"): Peak(835.5, 835.5, 60, "NVIDIA H200 Tensor Core GPU data sheet, 2024"),
    ("H200",): Peak(989.5, 989.5, 67, "NVIDIA H200 Tensor Core GPU data sheet, 2024"),
    ("H100", "NVL"): Peak(835.5, 835.5, 60, "NVIDIA H100 Tensor Core GPU data sheet, 2024"),
    ("H100", "PCIe"): Peak(756.5, 756.5, 51, "NVIDIA H100 Tensor Core GPU data sheet, 2022"),
    ("H100",): Peak(989.5, 989.5, 67, "NVIDIA H100 Tensor Core GPU data sheet, 2022"),
    ("H800",): Peak(989.5, 989.5, 67, "NVIDIA H800 Tensor Core GPU data sheet, 2023"),
    ("A100",): Peak(312, 312, 19.5, "NVIDIA A100 Tensor Core GPU data sheet, 2020"),
    ("A800",): Peak(312, 312, 19.5, "NVIDIA A800 Tensor Core GPU data sheet, 2022"),
    ("A40",): Peak(149.7, 149.7, 37.4, "NVIDIA A40 data sheet, 2020"),
    ("A30",): Peak(165, 165, 10.3, "NVIDIA A30 Tensor Core GPU data sheet, 2021"),
    ("A10G",): Peak(70, 70, 35, "NVIDIA A10G data sheet, 2021"),
    ("A10",): Peak(125, 125, 31.2, "NVIDIA A10 Tensor Core GPU data sheet, 2021"),
    ("L40S",): Peak(362, 362, 91.6, "NVIDIA L40S data sheet, 2023"),
    ("L40",): Peak(181, 181, 90.5, "NVIDIA L40 data sheet, 2022"),
    ("L4",): Peak(121, 121, 30.3, "NVIDIA L4 Tensor Core GPU data sheet, 2023"),
    ("V100", "PCIE"): Peak(None, 112, 14, "NVIDIA V100 Tensor Core GPU data sheet, 2020"),
    ("V100",): Peak(None, 125, 15.7, "NVIDIA V100 Tensor Core GPU data sheet, 2020"),
    ("T4",): Peak(None, 65, 8.1, "NVIDIA T4 Tensor Core GPU data sheet, 2019"),
    ("RTX 4090",): Peak(165.2, 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A, 2022"),
    ("RTX 3090",): Peak(71, 71, 35.6, "NVIDIA Ampere GA102 GPU architecture white paper, appendix A, 2020"),
}


def peak_flops(device_name: str, dtype: str = "bf16") -> float | None:
    """FLOP/s of a device as `torch.cuda.get_device_name` names it, at "bf16", "fp16" or "fp32"; None where it isn't known."""
    words = device_name.upper().replace("-", " ").replace("_", " ").split()
    for key, peak in PEAKS.items():
        if all(part in words for word in key for part in word.upper().split()):
            value = getattr(peak, dtype)
            return None if value is None else value * 1e12
    return None
