"""The images of mmdenoiserep.apis, under the names that they had here."""

from mmdenoiserep.apis.images import Folder, Unlabelled, find_images, open_images

__all__ = ['Folder', 'Unlabelled', 'find_images', 'open_images']
