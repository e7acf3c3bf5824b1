"""How good a codec is: `rate` (bpp, BD-rate), `distortion` (PSNR, MS-SSIM), `perception` (LPIPS), FID, CMMD, CLIP score.

Each module says by which protocol it measures; `networks` which of the feature networks are on this machine.
"""
