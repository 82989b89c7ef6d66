"""The torchvision MNIST family as verified tensors, and real DataLoaders that feed from them."""

from vae_torch.data.idx import DataError, idx_bytes, read_idx
from vae_torch.data.loaders import (
    Data,
    EpochBatches,
    ImageDataset,
    Loader,
    as_batch,
    as_loader,
    batches_in,
    binarize_images,
    data_hash,
    image_dataset,
    image_loader,
    images_of,
    labels_of,
    loaders_of,
    mnist_loaders,
)
from vae_torch.data.sources import Images, load_images
from vae_torch.seeds import mix_seed, seeded_generator

__all__ = [
    "Data",
    "DataError",
    "EpochBatches",
    "ImageDataset",
    "Images",
    "Loader",
    "as_batch",
    "as_loader",
    "batches_in",
    "binarize_images",
    "data_hash",
    "idx_bytes",
    "image_dataset",
    "image_loader",
    "images_of",
    "labels_of",
    "load_images",
    "loaders_of",
    "mix_seed",
    "mnist_loaders",
    "read_idx",
    "seeded_generator",
]
