/* A stand-in for pyxis, for tests: srun takes its options, and a task runs in a root of its own.
 *
 * The "image" is the host's root, copy-on-write and thrown away, so nothing is fetched; what is mounted with
 * --container-mounts is the host's. HIDDEN is empty inside unless it is mounted. Each task adds one line to the log:
 * image, mounts and working directory, separated by tabs.
 *   plugstack.conf:  required containers.so log=FILE root=EMPTY_FOLDER [hidden=FOLDER]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(containers, 1)

enum { IMAGE, MOUNTS, WORKDIR, HOME, COUNT };
static char *given[COUNT];

static int take(int which, const char *value, int remote)
{
	(void)remote;
	given[which] = strdup(value ? value : "");
	return 0;
}

struct spank_option spank_options[] = {
	{"container-image", "IMAGE", "image of the tasks", 1, IMAGE, take},
	{"container-mounts", "SOURCE:TARGET[:ro],...", "folders of the node", 1, MOUNTS, take},
	{"container-workdir", "FOLDER", "where tasks start", 1, WORKDIR, take},
	{"no-container-mount-home", NULL, "not the home of the node", 0, HOME, take},
	SPANK_OPTIONS_TABLE_END};

static const char *argument(int count, char **words, const char *name)
{
	size_t length = strlen(name);
	for (int i = 0; i < count; i++)
		if (!strncmp(words[i], name, length) && words[i][length] == '=')
			return words[i] + length + 1;
	return NULL;
}

static int failed(const char *what, const char *path)
{
	slurm_error("containers: %s %s: %s", what, path, strerror(errno));
	return -1;
}

static void make_parents(char *path)
{
	for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = 0;
		mkdir(path, 0755);
		*slash = '/';
	}
}

static int bind_into(const char *root, const char *source, const char *target, int read_only)
{
	char path[8192];
	struct stat facts;
	if (stat(source, &facts))
		return failed("mount source", source);
	snprintf(path, sizeof path, "%s%s", root, target);
	make_parents(path);
	if (S_ISDIR(facts.st_mode))
		mkdir(path, 0755);
	else
		close(open(path, O_CREAT | O_WRONLY, 0644));
	if (mount(source, path, NULL, MS_BIND | MS_REC, NULL))
		return failed("bind", path);
	if (read_only && mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return failed("read-only", path);
	return 0;
}

static int mount_all(const char *root)
{
	char *rest = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL, *one;
	while (rest && (one = strsep(&rest, ","))) {
		char *source = strsep(&one, ":"), *target = strsep(&one, ":");
		if (bind_into(root, source, target ? target : source, one && !strcmp(one, "ro")))
			return -1;
	}
	return 0;
}

static void write_line(const char *file)
{
	int log = open(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
	if (log < 0)
		return;
	dprintf(log, "%s\t%s\t%s\n", given[IMAGE], given[MOUNTS] ? given[MOUNTS] : "", given[WORKDIR] ? given[WORKDIR] : "/");
	close(log);
}

/* In the node's step daemon, for each task, before it becomes the user's. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char **words)
{
	(void)spank;
	if (spank_context() != S_CTX_REMOTE || !given[IMAGE])
		return 0;
	const char *top = argument(count, words, "root"), *hidden = argument(count, words, "hidden");
	char root[4096], upper[4096], work[4096], options[16384];
	write_line(argument(count, words, "log"));
	if (given[IMAGE][0] == '/' && access(given[IMAGE], R_OK))
		return failed("image", given[IMAGE]);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return failed("namespace", "/");
	if (mount("tmpfs", top, "tmpfs", 0, "mode=755"))
		return failed("tmpfs", top);
	snprintf(root, sizeof root, "%s/root", top);
	snprintf(upper, sizeof upper, "%s/upper", top);
	snprintf(work, sizeof work, "%s/work", top);
	mkdir(root, 0755), mkdir(upper, 0755), mkdir(work, 0755);
	snprintf(options, sizeof options, "lowerdir=/,upperdir=%s,workdir=%s", upper, work);
	if (mount("overlay", root, "overlay", 0, options))
		return failed("overlay", root);
	const char *kernel[] = {"/proc", "/sys", "/dev", "/etc/hosts"};
	for (int i = 0; i < 4; i++)
		if (bind_into(root, kernel[i], kernel[i], 0))
			return -1;
	if (hidden) {
		char path[8192];
		snprintf(path, sizeof path, "%s%s", root, hidden);
		if (mount("tmpfs", path, "tmpfs", 0, "mode=755"))
			return failed("hidden", path);
	}
	if (mount_all(root))
		return -1;
	if (chroot(root) || chdir(given[WORKDIR] ? given[WORKDIR] : "/"))
		return failed("root", root);
	return 0;
}

/* As the user: the step daemon has gone back to its own folder. */
int slurm_spank_task_init(spank_t spank, int count, char **words)
{
	(void)spank, (void)count, (void)words;
	if (spank_context() == S_CTX_REMOTE && given[IMAGE] && chdir(given[WORKDIR] ? given[WORKDIR] : "/"))
		return failed("working directory", given[WORKDIR]);
	return 0;
}
