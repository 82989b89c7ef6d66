"""Images: their sources, as verified tensors, and DataLoaders over them."""

from vae_torch.data.sources import load_images  # first in the table

# isort: split
from vae_torch.data import arrays, benchmarks, folder, sources, torchvision_sets  # fill the table
from vae_torch.data.batches import (
    Data,
    Loader,
    as_batch,
    as_loader,
    batches_in,
    image_loader,
    images_of,
    labels_of,
)
from vae_torch.data.dataset import EpochBatches, ImageDataset
from vae_torch.data.idx import DataError, idx_bytes, read_idx
from vae_torch.data.loaders import (
    array_loaders,
    binarize_images,
    classes_of,
    data_hash,
    folder_loaders,
    image_dataset,
    loaders_of,
    mnist_loaders,
    shape_of,
)
from vae_torch.data.table import Images, Splits, data_sources
from vae_torch.seeds import mix_seed, seeded_generator

__all__ = [
    "Data", "DataError", "EpochBatches", "ImageDataset", "Images", "Loader", "Splits",
    "array_loaders", "arrays", "as_batch", "as_loader", "batches_in", "benchmarks",
    "binarize_images", "classes_of", "data_hash", "data_sources", "folder", "folder_loaders",
    "idx_bytes",
    "image_dataset", "image_loader", "images_of", "labels_of", "load_images", "loaders_of",
    "mix_seed", "mnist_loaders", "read_idx", "seeded_generator", "shape_of", "sources",
    "torchvision_sets",
]  # fmt: skip
