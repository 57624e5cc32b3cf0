"""A stand-in for lightly.transforms."""

from torchvision.transforms import functional


class MoCoV1Transform:
    def __init__(self, input_size):
        self.size = input_size

    def __call__(self, image):
        return [functional.to_tensor(image.resize((self.size, self.size)))] * 2


MoCoV2Transform = MoCoV1Transform
