"""One variant of one model in a process of its own; started by `latency`, with a JSON request.

Prints a JSON line when the model is loaded, and one for every line that it reads.
"""

import json
import sys
import time

request = json.loads(sys.argv[1])
sys.path[:0] = request["path"]

import numpy as np  # noqa: E402

images = np.load(request["images"])
started = time.perf_counter()
if request["variant"] == "onnxruntime":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    session = onnxruntime.InferenceSession(
        request["file"], options, providers=["CPUExecutionProvider"]
    )
    (argument,) = (item.name for item in session.get_inputs())
    version, engine = onnxruntime.__version__, "ONNX Runtime"

    def predict(batch: np.ndarray) -> np.ndarray:
        return session.run(None, {argument: batch})[0]

else:
    import torch

    torch.set_num_threads(request["threads"])
    version, engine = str(torch.__version__), request["variant"]
    if request["variant"] == "eager":
        import torchvision

        model = torchvision.models.get_model(request["model"])
        model.load_state_dict(torch.load(request["file"], weights_only=True))
        model.eval()
    elif request["variant"] == "traced":
        model = torch.jit.load(request["file"])
    else:
        from network import load

        kind = "export" if request["variant"] == "export" else "torchscript"
        with open(request["file"], "rb") as file:
            model = load(file, kind, images.shape[-1])
        engine = model.engine

    def predict(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()


loaded = time.perf_counter()
calls = []
for _ in range(2):
    before = time.perf_counter()
    predict(images[:1])
    calls.append(time.perf_counter() - before)
answer = {
    "load": loaded - started,
    "first_call": calls[0],
    "second_call": calls[1],
    "engine": engine,
    "version": version,
    "logits": [predict(image[None].copy())[0].tolist() for image in images],
}
print(json.dumps(answer), flush=True)
for _ in sys.stdin:
    seconds = []
    for _ in range(request["in_a_row"]):
        before = time.perf_counter()
        predict(images[:1])
        seconds.append(round(time.perf_counter() - before, 6))
    print(json.dumps({"seconds": seconds[2:]}), flush=True)
