"""Runs img2dataset on one list, then prints a line of JSON: its CPU seconds and the URLs that it kept.

runner.py LIST OUTPUT PROCESSES THREADS SHARD_URLS TIMEOUT [AUTHORITY]
"""
import collections
import glob
import json
import os
import resource
import sys


def main(urls, output, processes, threads, shard_urls, timeout, authority=None):
    if authority:
        # Beside all that a user's machine trusts: each picture has them all read again.
        import certifi

        os.environ["SSL_CERT_FILE"] = urls + ".pem"
        with open(urls + ".pem", "w") as all_authorities, open(authority) as ours:
            all_authorities.write(certifi.contents() + ours.read())
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import download

    download(
        url_list=urls,
        input_format="csv",
        url_col="url",
        caption_col="caption",
        output_folder=output,
        output_format="webdataset",
        image_size=256,
        resize_mode="center_crop",
        encode_quality=95,
        processes_count=int(processes),
        thread_count=int(threads),
        number_sample_per_shard=int(shard_urls),
        timeout=int(timeout),
        retries=0,
        enable_wandb=False,
    )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)

    from pyarrow import parquet

    kept, errors = [], collections.Counter()
    for name in glob.glob(os.path.join(output, "*.parquet")):
        table = parquet.read_table(name, columns=["url", "status", "error_message"]).to_pydict()
        kept += [url for url, status in zip(table["url"], table["status"]) if status == "success"]
        errors.update(table["error_message"])
    print(errors.most_common(9), file=sys.stderr)
    print(json.dumps({"cpu_seconds": cpu_seconds, "kept": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
