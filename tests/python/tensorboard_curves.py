"""Reads event files with TensorBoard's own reader.

    tensorboard_curves.py FOLDER

Prints, as JSON, of each curve (RUN/KIND/TAG) its points: step and value.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

curves = defaultdict(list)
folder = Path(sys.argv[1])
for file in sorted(folder.rglob("events.out.tfevents.*")):
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = float(tensor_util.make_ndarray(value.tensor)) if value.HasField("tensor") else value.simple_value
            curves[f"{file.parent.relative_to(folder)}/{value.tag}"].append([event.step, number])
print(json.dumps(curves))
