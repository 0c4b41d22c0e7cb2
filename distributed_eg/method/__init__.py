"""The method of Aljundi et al. (CVPR 2017): values in, values out; torch and torchvision, nothing else."""
