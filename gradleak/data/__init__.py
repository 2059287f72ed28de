"""Reading images, tables and tensors from untrusted files, and writing tensors whole or not at all."""

from gradleak.data.batches import read_batch
from gradleak.data.images import Images, demo_image, load_images
from gradleak.data.tables import read_rows, read_schema, table_of_frame, table_of_transformer, write_schema
from gradleak.data.tensors import float64_bytes, read_tensors, write_tensors
from gradleak.files import write_bytes

__all__ = [
    "Images", "demo_image", "float64_bytes", "load_images", "read_batch", "read_rows", "read_schema", "read_tensors",
    "table_of_frame", "table_of_transformer", "write_bytes", "write_schema", "write_tensors",
]  # fmt: skip
