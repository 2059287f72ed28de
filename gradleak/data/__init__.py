"""Reading images and tensors from untrusted files, and writing tensors whole or not at all."""

from gradleak.data.images import Images, demo_image, load_images
from gradleak.data.tensors import read_tensors, write_bytes, write_tensors

__all__ = ["Images", "demo_image", "load_images", "read_tensors", "write_bytes", "write_tensors"]
