"provisional: replaced by the export of nbs/09_plots.ipynb"
import numpy as np
from PIL import Image
def colour_range(maps, labels=None): return float(maps.min()), float(maps.max())
def draw_panel(image, mask, anomaly_map, score, top, kind='', threshold=None, low=0.): return image
