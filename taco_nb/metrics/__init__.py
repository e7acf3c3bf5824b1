"""Metrics say how good a codec is, each by a protocol that its module states.

`rate` has bits per pixel and BD-rates, `distortion` PSNR and MS-SSIM, `perception` LPIPS, `fid` FID, and `joint_space` CMMD
and the CLIP score. `networks` knows which of their feature networks are on this machine.
"""
