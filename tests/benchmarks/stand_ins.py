"""Small stand-ins for torchvision's datasets."""

from PIL import Image
from torchvision.datasets import VisionDataset


class ColourImages(VisionDataset):
    """Stands in for CIFAR-10 or MNIST: 40 images of 8 x 8 pixels, each of one colour that tells its class."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        super().__init__(root)
        if download:
            raise OSError("no route to host")
        self.targets = [k % 10 for k in range(40)]
        self.classes = [f"colour {k}" for k in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (self.targets[index] * 20, 0, 255)), self.targets[index]
