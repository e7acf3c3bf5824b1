"""How good a codec is: `rate` (bpp, BD-rate), `distortion` (PSNR, MS-SSIM), `perception` (LPIPS)."""
