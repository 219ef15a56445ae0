"""Other inference engines on the same network: those of PyPI that are installed, each at its best settings.

``pip install -e .[bench-peers]``. Each function takes diffusers' ``UNet2DModel`` with (x, t) and returns a call without
arguments. All use as many threads as torch does; float32 unless told otherwise.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[], Tensor]


class Exported(nn.Module):
    """Tensors in, a tensor out: what exporters want."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, return_dict=False)[0]


class AtStep(nn.Module):
    """The network at one time step, which is then a constant."""

    def __init__(self, network: nn.Module, t: Tensor):
        super().__init__()
        self.network = Exported(network)
        self.register_buffer("t", t)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.t)


def onnx(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Path:
    """The network as a file, made once in a folder."""
    path = folder / "network.onnx"
    if not path.exists():
        with torch.no_grad():
            torch.onnx.export(
                Exported(network), (x, t), path, input_names=["x", "t"], output_names=["y"], dynamo=True, verbose=False
            )
    return path


def eager(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: network(x, t, return_dict=False)[0])


def eager_bf16(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    return torch.autocast("cpu", torch.bfloat16)(eager(network, x, t, folder))


def inductor(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    """With weights frozen, which lets it choose their layout."""
    torch._dynamo.reset()
    x = x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(Exported(network), options={"freezing": True})
    return torch.no_grad()(lambda: compiled(x, t))


def onnxruntime(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx(network, x, t, folder), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy(), "t": t.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(network: nn.Module, x: Tensor, t: Tensor, folder: Path, precision: str = "f32") -> Call:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    compiled = core.compile_model(core.read_model(onnx(network, x, t, folder)), "CPU", settings)
    request = compiled.create_infer_request()
    feed = [x.contiguous().numpy(), t.numpy()]

    def run() -> Tensor:
        request.infer(feed, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return run


def openvino_bf16(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    return openvino(network, x, t, folder, "bf16")


def mnn(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    import MNN

    path = folder / "network.mnn"
    if not path.exists():
        converter = [Path(sys.executable).with_name("mnnconvert"), "-f", "ONNX", "--bizCode", "benchmark"]
        files = ["--modelFile", onnx(network, x, t, folder), "--MNNModel", path]
        subprocess.run([*converter, *files], check=True, capture_output=True)
    runtime = MNN.nn.create_runtime_manager(
        ({"backend": "CPU", "numThread": torch.get_num_threads(), "precision": "high", "memory": "high"},)
    )
    module = MNN.nn.load_module_from_file(str(path), ["x", "t"], ["y"], runtime_manager=runtime)
    images, steps, NCHW = x.contiguous().numpy(), t.int().numpy(), MNN.expr.NCHW

    def run() -> Tensor:
        feed = [
            MNN.expr.const(images, list(images.shape), NCHW),
            MNN.expr.const(steps, list(steps.shape), NCHW, MNN.expr.int),
        ]
        return torch.from_numpy(np.array(MNN.expr.convert(module.forward(feed)[0], NCHW).read()))

    return run


def ncnn(network: nn.Module, x: Tensor, t: Tensor, folder: Path) -> Call:
    """One image, for ncnn has no batches."""
    import ncnn
    import pnnx

    if not (folder / "network.ncnn.bin").exists():
        torch.jit.trace(AtStep(network, t).eval(), (x,)).save(folder / "network.pt")
        size = ",".join(map(str, x.shape))
        converter = [pnnx.EXEC_PATH, "network.pt", f"inputshape=[{size}]", "fp16=0"]
        subprocess.run(converter, check=True, capture_output=True, cwd=folder)
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    net.load_param(str(folder / "network.ncnn.param"))
    net.load_model(str(folder / "network.ncnn.bin"))
    image = x[0].contiguous().numpy()

    def run() -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]

    return run


ENGINES = {
    "torch": (eager, "torch"),
    "inductor": (inductor, "torch"),
    "ONNX Runtime": (onnxruntime, "onnxruntime"),
    "OpenVINO": (openvino, "openvino"),
    "MNN": (mnn, "MNN"),
    "ncnn": (ncnn, "ncnn"),
    "torch bf16": (eager_bf16, "torch"),
    "OpenVINO bf16": (openvino_bf16, "openvino"),
}


def calls(network: nn.Module, x: Tensor, t: Tensor, *, folder: Path, peers: bool) -> dict[str, Call]:
    """The network in torch, and if ``peers`` in each engine that is installed."""
    there = {
        name: make
        for name, (make, package) in ENGINES.items()
        if importlib.util.find_spec(package) and (len(x) == 1 or name != "ncnn")
    }
    wanted = there if peers else {name: make for name, make in there.items() if name in ("torch", "torch bf16")}
    return {name: make(network, x, t, folder) for name, make in wanted.items()}
