"""Run a model over images with the packages of the layer and nothing else; started by `trace`.

The interpreter was started with -I -S, so that the packages it finds are those that the function
will find on Lambda. The one argument is a JSON file; the logits go to the file that it names, the
versions to standard output.
"""

import json
import sys
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text())
sys.path[:0] = [request["packages"], request["preprocessing_module"]]

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from preprocessing import Preprocessing  # noqa: E402

preprocess = Preprocessing.from_json(request["preprocessing"])
model = torch.jit.load(request["model"], map_location="cpu").eval()
with torch.inference_mode():
    logits = [
        model(torch.from_numpy(preprocess(Image.open(path))[None])) for path in request["images"]
    ]
np.save(request["answer"], torch.cat(logits).numpy())
versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
print(json.dumps({name: str(version) for name, version in versions.items()}))
