"""Data sets, verified: MNIST, poems and plays from ``data/``, pictures of your own, and toy densities in the plane."""

from .files import DataError, FileCheck, check_data, inflate, verified_bytes
from .folders import image_folder
from .mnist import MNIST_FILES, Images, binarize, load_mnist, read_idx
from .text import IGNORE, Poem, TokenDataset, Work, is_regulated, load_poems, load_shakespeare
from .toy import MOONS_STD, TOY_NAMES, toy_2d, toy_log_density, toy_mixture

__all__ = [
    "IGNORE",
    "MNIST_FILES",
    "MOONS_STD",
    "TOY_NAMES",
    "DataError",
    "FileCheck",
    "Images",
    "Poem",
    "TokenDataset",
    "Work",
    "binarize",
    "check_data",
    "image_folder",
    "inflate",
    "is_regulated",
    "load_mnist",
    "load_poems",
    "load_shakespeare",
    "read_idx",
    "toy_2d",
    "toy_log_density",
    "toy_mixture",
    "verified_bytes",
]
