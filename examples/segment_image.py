"""One image, step by step:  python examples/segment_image.py IMAGE [MODEL]   writes segments.png, a map of ids."""

import sys

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

import maskcls_hf  # noqa: F401  (the Auto classes now know its models)

path, name = (*sys.argv[1:], "model_cards/maskcls-nuclei-tiny")[:2]
image_processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForUniversalSegmentation.from_pretrained(name)

inputs = image_processor(Image.open(path), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
result = image_processor.post_process_panoptic_segmentation(outputs)[0]

for segment in result["segments_info"]:
    print(f"{segment['id']:4d}  {model.config.id2label[segment['label_id']]:12}  {segment['score']:.2f}")
Image.fromarray(result["segmentation"].numpy().astype("uint16")).save("segments.png")
