"""A stand-in for lightly.data."""

from pathlib import Path

from PIL import Image


class LightlyDataset:
    def __init__(self, input_dir, transform):
        self.files, self.transform = sorted(Path(input_dir).rglob("*.jpg")), transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, place):
        with Image.open(self.files[place]) as image:
            return self.transform(image.convert("RGB")), 0, self.files[place].name
