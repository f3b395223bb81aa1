"""How picking grows: 1% of ten thousand to one million rows of 128 values.

`python benchmarks/growth.py` picks from isotropic noise, each size in a process of its own, whose memory is watched.
Work grows with the square of the rows, since there are more rows and more picks; memory in proportion to them. Prints a
table and writes results/growth.json.
"""
import torch
from common import DEVICES, fresh, isotropic, on_disk, options, pick_watched, report

SIZES = 10_000, 30_000, 100_000, 300_000, 1_000_000


def main():
    args = options(__doc__)
    rows = []
    for device in DEVICES:
        for n in (1000, 2000) if args.quick else SIZES:
            with on_disk(isotropic(n, 128)) as path: found = fresh(pick_watched, path, n//100, device, torch.get_num_threads())
            first = rows[-1] if rows and rows[-1]['device'] == device else None
            rows.append(dict(device=device, what=f'{n:,} rows', rows=n, picks=n//100, baseline=first and first['what'], seconds=found['seconds'], ratio=found['seconds']/first['seconds'] if first else 1.,
                             megabytes=None if found['peak'] is None else found['peak']/1e6, bytes_a_row=None if found['peak'] is None else found['peak']/n))
    report(args, __file__, 'farthest_points at ratio 0.01 on rows of 128 values (512 bytes); memory on top of the input', rows)


if __name__ == '__main__': main()
