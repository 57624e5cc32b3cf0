"""Transfer to detection, keypoints and segmentation by the paper's protocols."""
