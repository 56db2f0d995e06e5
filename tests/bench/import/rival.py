"""Makes the same pictures out of the same files as `gleaner dataset import`: centre crops of 256 x 256 pixels as JPEGs of
quality 95, in WebDataset tars. Prints a line of JSON: seconds and CPU seconds of all processes, start included, and how many
pictures it wrote.

rival.py make FOLDER TARS PARQUET                       the same pictures as tars and as Parquet
rival.py img2dataset FOLDER OUTPUT PROCESSES
rival.py folder|tars|parquet FOLDER OUTPUT PROCESSES    by Hugging Face's `datasets`
"""

import glob
import io
import json
import multiprocessing
import os
import pathlib
import resource
import sys
import time

BEGUN = time.time()
os.environ["HF_HUB_OFFLINE"] = "1"
SIZE, QUALITY, SHARD, ROWS = 256, 95, 1000, 100


def make(folder, tars, parquet):
    import webdataset
    from datasets import load_dataset
    from datasets.table import embed_table_storage

    classes = sorted(path.name for path in pathlib.Path(folder).iterdir())
    with webdataset.ShardWriter(os.path.join(tars, "train-%05d.tar"), maxcount=SHARD, verbose=0) as writer:
        for n, path in enumerate(sorted(pathlib.Path(folder).glob("*/*.jpg"))):
            writer.write({"__key__": f"{n:09}", "jpg": path.read_bytes(), "cls": classes.index(path.parent.name)})
    # As it is pushed to the hub: with the pictures in it.
    rows = load_dataset("imagefolder", data_dir=folder, split="train").with_format("arrow")
    rows = rows.map(embed_table_storage, batched=True, batch_size=ROWS).with_format(None)
    rows.to_parquet(os.path.join(parquet, "train-00000-of-00001.parquet"), batch_size=ROWS)


def img2dataset(folder, output, processes):
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import download

    names = output + ".csv"
    with open(names, "w") as file:
        file.write("url,caption\n")
        file.writelines(f"file://{path},{path.parent.name}\n" for path in pathlib.Path(folder).glob("*/*.jpg"))
    download(
        url_list=names,
        input_format="csv",
        url_col="url",
        caption_col="caption",
        output_folder=output,
        output_format="webdataset",
        image_size=SIZE,
        resize_mode="center_crop",
        encode_quality=QUALITY,
        processes_count=processes,
        thread_count=8,
        number_sample_per_shard=SHARD,
        enable_wandb=False,
    )
    return sum(json.load(open(name))["successes"] for name in glob.glob(os.path.join(output, "*_stats.json")))


def loaded(kind, folder, processes):
    from datasets import load_dataset

    if kind == "folder":
        return load_dataset("imagefolder", data_dir=folder, split="train")
    name, ending, picture = {"tars": ("webdataset", "tar", "jpg"), "parquet": ("parquet", "parquet", "image")}[kind]
    files = sorted(glob.glob(os.path.join(folder, "*." + ending)))
    rows = load_dataset(name, data_files={"train": files}, split="train", num_proc=min(processes, len(files)))
    return rows if picture == "image" else rows.rename_column(picture, "image").rename_column("cls", "label")


def write(rows, tar):
    import webdataset
    from PIL import Image, ImageOps

    with webdataset.TarWriter(tar) as writer:
        for n, row in enumerate(rows):
            picture, jpeg = ImageOps.fit(row["image"].convert("RGB"), (SIZE, SIZE), Image.LANCZOS), io.BytesIO()
            picture.save(jpeg, "JPEG", quality=QUALITY)
            writer.write({"__key__": f"{n:09}", "jpg": jpeg.getvalue(), "cls": str(row["label"])})
    return len(rows)


def by_datasets(kind, folder, output, processes):
    rows = loaded(kind, folder, processes)
    shards = -(-len(rows) // SHARD)
    jobs = [(rows.shard(shards, n, contiguous=True), os.path.join(output, f"{n:05}.tar")) for n in range(shards)]
    with multiprocessing.Pool(processes) as pool:
        return sum(pool.starmap(write, jobs, chunksize=1))


def main(kind, *rest):
    if kind == "make":
        return make(*rest)
    folder, output, processes = rest
    os.makedirs(output)
    kept = (img2dataset(folder, output, int(processes)) if kind == "img2dataset"
            else by_datasets(kind, folder, output, int(processes)))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(json.dumps({"seconds": time.time() - BEGUN, "cpu_seconds": cpu_seconds, "kept": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
