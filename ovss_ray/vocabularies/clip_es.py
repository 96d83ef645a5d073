"""Texts that the authors of TagCLIP and CLIP-ES (linyq2117/TagCLIP) put beside, or in place of, the class names."""

from __future__ import annotations

# fmt: off
COCO_BACKGROUND = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge",
)
# fmt: on
"""Names of what is no class of COCO."""

VOC_BACKGROUND = (*COCO_BACKGROUND, "keyboard", "sign")
"""Names of what is no class of PASCAL VOC."""

CAM_TEMPLATE = "a clean origami {}."

CAM_NAMES = {
    "bird": "bird avian",
    "chair": "chair seat",
    "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
    "tv": "tvmonitor screen",
    "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse",
    "tie": "necktie",
    "snowboard": "sknowboard",  # as published
    "baseball glove": "glove",
    "spoon": "dessertspoon",
    "remote": "remote control",
    "hair drier": "hairdrier,blowdrier",
}
"""What stands for a class of VOC or COCO when masks are drawn by Grad-CAM; other classes keep their name."""
