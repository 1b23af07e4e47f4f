"""The images of mmdenoiserep.apis, under the names that they had here."""

from mmdenoiserep.apis.folders import find_images
from mmdenoiserep.apis.images import Folder, Unlabelled, open_images

__all__ = ['Folder', 'Unlabelled', 'find_images', 'open_images']
