"""Which method and settings suit images that nobody has labelled: candidates ranked by a reward that CLIP gives.

The reward is that of Luo et al., "Emergent Open-Vocabulary Semantic Segmentation from Off-the-shelf Vision-Language
Models" (PnP-OVSS, CVPR 2024), section 3.4.
"""
