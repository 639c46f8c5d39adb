"""Run a model over images with the packages of the layer and nothing else; started by `trace`.

The interpreter was started with -I -S, so that the packages it finds are those that the function
will find on Lambda; the model is loaded by the function's own code. The one argument is a JSON
file; the logits go to the file that it names; versions, engine and median time of an image, in
milliseconds, to standard output.
"""

import json
import statistics
import sys
import time
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text())
sys.path[:0] = [request["packages"], request["function"]]

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from network import load  # noqa: E402
from preprocessing import Preprocessing  # noqa: E402

preprocess = Preprocessing.from_json(request["preprocessing"])
with open(request["model"], "rb") as file:
    network = load(file, request["kind"], preprocess.crop)
logits, seconds = [], []
with torch.inference_mode():
    for path in request["images"]:
        image = torch.from_numpy(preprocess(Image.open(path))[None])
        started = time.perf_counter()
        logits.append(network(image))
        seconds.append(time.perf_counter() - started)
np.save(request["answer"], torch.cat(logits).numpy())
versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
answer = {
    "versions": {name: str(version) for name, version in versions.items()},
    "engine": network.engine,
    "milliseconds": statistics.median(seconds) * 1000,
}
print(json.dumps(answer))
